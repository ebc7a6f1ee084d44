//! Connections that the guest begins.

use super::*;

#[test]
fn connects_to_the_socket_of_the_port() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.accepted();
    guest.send_data(ports, b"ping");
    assert_eq!(read_now(&mut program), b"ping");
    program.write_all(b"pong").unwrap();
    guest.poll();
    assert_eq!(guest.data(), b"pong");
}

#[test]
fn the_first_bytes_of_a_program_follow_the_answer() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let listener = guest.listen(80);
    let ports = Ports {
        host: 80,
        guest: 1000,
    };
    guest.send(Op::Request, ports);
    listener.accept().unwrap().0.write_all(b"220 ready").unwrap();
    guest.poll();
    let ops: Vec<_> = guest
        .received()
        .into_iter()
        .map(|(header, _)| header.op)
        .collect();
    assert_eq!(ops[..2], [Op::Response as u16, Op::Shutdown as u16]);
}

#[test]
fn refuses_a_port_where_nobody_listens() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    guest.send(
        Op::Request,
        Ports {
            host: 80,
            guest: 1000,
        },
    );
    let reset = guest.control();
    assert_eq!(
        (reset.op, reset.src_port, reset.dst_port),
        (Op::Reset as u16, 80, 1000)
    );
    drop(guest.listen(81));
    guest.send(
        Op::Request,
        Ports {
            host: 81,
            guest: 1000,
        },
    );
    assert_eq!(guest.control().op, Op::Reset as u16);
    assert_eq!(guest.counter("muxer_event_fails"), 2);
}

#[test]
fn one_port_serves_many_connections() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let listener = guest.listen(80);
    for port in 1..=3u32 {
        let ports = Ports {
            host: 80,
            guest: port,
        };
        guest.send(Op::Request, ports);
        guest.send_data(ports, &[u8::try_from(port).unwrap()]);
    }
    assert_eq!(guest.received().len(), 3);
    for port in 1..=3 {
        let mut byte = [0];
        listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [port]);
    }
}

/// A socket at `port` that takes no connections now, with those that fill its queue.
fn busy(guest: &Guest<'_>, port: u32) -> (UnixListener, Vec<UnixStream>) {
    let listener = guest.listen(port);
    // SAFETY: needed as std does not let the length of the queue be chosen. The socket listens already.
    unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) };
    let path = guest.folder.as_path().join(format!("v_{port}"));
    let connect = || crate::unix_socket::connect(&path).ok();
    (listener, std::iter::from_fn(connect).collect())
}

/// Lets the device's timer expire.
fn wait_for_timer(guest: &mut Guest<'_>) {
    std::thread::sleep(super::super::muxer::RETRY_PAUSE);
    guest.poll();
}

#[test]
fn tries_again_when_a_program_has_no_room() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (listener, waiting) = busy(&guest, 80);
    let ports = Ports {
        host: 80,
        guest: 1000,
    };
    guest.send(Op::Request, ports);
    assert_eq!(guest.received(), []);
    for _ in &waiting {
        listener.accept().unwrap();
    }
    let answered = (0..1000).find_map(|_| {
        wait_for_timer(&mut guest);
        guest.received().pop()
    });
    assert_eq!(answered.unwrap().0.op, Op::Response as u16);
    assert!(listener.accept().is_ok());
}

#[test]
fn gives_up_on_a_program_that_never_has_room() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (_listener, _waiting) = busy(&guest, 80);
    guest.send(
        Op::Request,
        Ports {
            host: 80,
            guest: 1000,
        },
    );
    let answered = (0..1000).find_map(|_| {
        wait_for_timer(&mut guest);
        guest.received().pop()
    });
    assert_eq!(answered.unwrap().0.op, Op::Reset as u16);
    assert_eq!(guest.counter("conns_killed"), 1);
}

#[test]
fn a_guest_that_loses_patience_is_forgotten() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (_listener, _waiting) = busy(&guest, 80);
    let ports = Ports {
        host: 80,
        guest: 1000,
    };
    guest.send(Op::Request, ports);
    guest.shut_down(ports, 3);
    assert_eq!(guest.control().op, Op::Reset as u16);
    assert_eq!(guest.counter("conns_removed"), 1);
}

#[test]
fn a_port_may_be_used_again_after_the_end() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    for _ in 0..3 {
        let (program, ports) = guest.accepted();
        guest.shut_down(ports, 3);
        assert_eq!(guest.control().op, Op::Reset as u16);
        drop(program);
    }
    assert_eq!(
        (guest.counter("conns_added"), guest.counter("conns_removed")),
        (3, 3)
    );
}

#[test]
fn a_port_may_be_used_again_while_the_host_waits_for_the_end() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    drop(guest.accepted());
    guest.poll();
    assert_eq!(guest.received().last().unwrap().0.flags, 3);
    // The guest never ended it.
    let (mut program, ports) = guest.accepted();
    guest.send_data(ports, b"new");
    assert_eq!(read_now(&mut program), b"new");
}
