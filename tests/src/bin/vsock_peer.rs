//! A guest's end of test connections over vsock. It is copied into guests by the tests that need it.
//!
//! usage: vsock_peer listen|connect PORT COUNT echo|hold|ping|send BYTES|take BYTES
//!
//! It makes COUNT connections to a port of the host, or accepts as many, and only then does with all of them at once
//! what the last arguments say. It ends with 0 when every connection went as it should.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;

use mayfly_tests::{Failure, Result, stream};

/// What to do with a connection.
#[derive(Clone, Copy)]
enum Role {
    Echo,
    Hold,
    Ping,
    Send(u64),
    Take(u64),
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("vsock_peer: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> Result {
    let [way, port, count, role, rest @ ..] = args else {
        return Err(Failure::new(
            "usage: vsock_peer listen|connect PORT COUNT ROLE [BYTES]",
        ));
    };
    let bytes = || rest.first().unwrap_or(&"").parse::<u64>();
    let role = match *role {
        "echo" => Role::Echo,
        "hold" => Role::Hold,
        "ping" => Role::Ping,
        "send" => Role::Send(bytes()?),
        "take" => Role::Take(bytes()?),
        other => return Err(Failure::new(format!("unknown role {other}"))),
    };
    let (port, count) = (port.parse()?, count.parse()?);
    let streams: Vec<UnixStream> = match *way {
        "listen" => accept(port, count)?,
        "connect" => (0..count).map(|_| connect(port)).collect::<io::Result<_>>()?,
        other => return Err(Failure::new(format!("unknown way {other}"))),
    };
    let works = (0..).zip(streams).map(|(number, stream)| {
        let small = thread::Builder::new().stack_size(128 << 10);
        small.spawn(move || work(role, stream, number).map_err(|failure| failure.to_string()))
    });
    let works = works.collect::<io::Result<Vec<_>>>()?;
    for work in works {
        let result = work.join().unwrap_or_else(|_| Err("a thread panicked".into()));
        result.map_err(Failure::new)?;
    }
    Ok(())
}

fn work(role: Role, mut stream: UnixStream, number: u64) -> Result {
    match role {
        Role::Echo => stream::echo(&mut stream),
        Role::Hold => {
            stream::hold(&mut stream);
            Ok(())
        }
        Role::Ping => stream::ping(&mut stream, number),
        Role::Send(bytes) => {
            stream::send(&mut stream, bytes)?;
            stream::take(&mut stream, 0)
        }
        Role::Take(bytes) => stream::take(&mut stream, bytes),
    }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: needed as the standard library has no such sockets. The descriptor is new, and owned from here on.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn address(cid: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    // SAFETY: needed as the structure has private padding; all zero is a valid one.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).expect("AF_VSOCK is 40");
    address.svm_cid = cid;
    address.svm_port = port;
    let len = libc::socklen_t::try_from(size_of_val(&address)).expect("16 fits");
    (address, len)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn connect(port: u32) -> io::Result<UnixStream> {
    let socket = socket()?;
    let (address, len) = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: needed as above. The address lives across the call and has the given length.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(socket.into())
}

fn accept(port: u32, count: u32) -> io::Result<Vec<UnixStream>> {
    let socket = socket()?;
    let (address, len) = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: needed as above. The address lives across the call and has the given length.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    // SAFETY: needed as above; it is given numbers only.
    check(unsafe { libc::listen(socket.as_raw_fd(), 1024) })?;
    let accept = |_| {
        let nowhere = std::ptr::null_mut();
        // SAFETY: needed as above. No address is asked for; the descriptor is new, and owned from here on.
        unsafe {
            let fd = check(libc::accept(socket.as_raw_fd(), nowhere, std::ptr::null_mut()))?;
            Ok(OwnedFd::from_raw_fd(fd).into())
        }
    };
    (0..count).map(accept).collect()
}
