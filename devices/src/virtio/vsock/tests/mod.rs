//! The vsock device from the outside: a [`Guest`] with its queues in plain memory, and real unix sockets for the
//! programs of the host.

mod close;
mod connection;
mod device;
mod flow;
mod from_guest;
mod from_host;
mod hostile;
mod listener;
mod many;
mod noise;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::packet::{HEADER_LEN, HOST_CID, Header, Op, Ports, TYPE_STREAM};
use super::{BUF_ALLOC, Config, EVENT, RX, TX, Vsock};
use crate::GuestMemory;
use crate::testing::{self, Driver, Recorder, memory, readable, writable};
use crate::virtio::{DeviceError, Io, Queue, VirtioDevice};

const CID: u32 = 7;
/// Where receive buffers, and what the guest sends, start; the rings lie below.
const BUFFERS: u64 = 0x10_0000;
const SENT: u64 = 0x80_0000;
/// Entries of the queues.
const SIZE: u16 = 256;

/// Memory for rings and buffers.
fn ram() -> GuestMemory {
    memory(16 << 20)
}

/// A driver with its device, and a folder for the sockets.
struct Guest<'m> {
    mem: &'m GuestMemory,
    rx: Driver<'m>,
    tx: Driver<'m>,
    event: Driver<'m>,
    queues: [Queue; 3],
    recorder: Arc<Recorder>,
    vsock: Vsock,
    folder: TempDir,
    /// Receive buffers by their head: address and length.
    buffers: HashMap<u16, (u64, u32)>,
    next_buffer: u64,
    /// What the device asked for in its last call.
    again: Option<u16>,
}

impl<'m> Guest<'m> {
    /// A guest that has offered 64 receive buffers of 4 KiB.
    fn new(mem: &'m GuestMemory) -> Self {
        let mut guest = Self::without_buffers(mem);
        guest.offer(64, 4096);
        guest
    }

    fn without_buffers(mem: &'m GuestMemory) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("v");
        Self::at(mem, folder, path)
    }

    /// A guest whose device is at `path`.
    fn at(mem: &'m GuestMemory, folder: TempDir, path: PathBuf) -> Self {
        let vsock = config(path).build().unwrap();
        let drivers = [0x1000, 0x1_0000, 0x2_0000].map(|base| Driver::new(mem, base, SIZE));
        let queues = [0, 1, 2].map(|i: usize| drivers[i].queue(false));
        let [rx, tx, event] = drivers;
        let mut guest = Self {
            mem,
            rx,
            tx,
            event,
            queues,
            recorder: testing::recorder(),
            vsock,
            folder,
            buffers: HashMap::new(),
            next_buffer: 0,
            again: None,
        };
        guest.call(|vsock, io| vsock.activate(io)).unwrap();
        guest
    }

    fn call(
        &mut self,
        work: impl FnOnce(&mut Vsock, &mut Io<'_>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, 0);
        let result = work(&mut self.vsock, &mut io);
        self.again = io.again;
        result
    }

    fn kick(&mut self, queue: u16) {
        self.call(|vsock, io| vsock.on_queue(queue, io)).unwrap();
    }

    /// Lets the device see what the host's programs have done, and do all that it wants to do.
    fn poll(&mut self) {
        self.call(|vsock, io| vsock.on_event(0, io)).unwrap();
        self.work();
    }

    fn work(&mut self) {
        while let Some(queue) = self.again {
            self.kick(queue);
        }
    }

    /// Offers `count` receive buffers of `len` bytes.
    fn offer(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let place = self.next_buffer % (6 << 20);
            self.next_buffer = place + u64::from(len);
            let head = self.rx.offer(&[writable(BUFFERS + place, len)]);
            self.buffers.insert(head, (BUFFERS + place, len));
        }
    }

    /// The packets received since the last call, whose buffers are offered again.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used: Vec<_> = std::iter::from_fn(|| self.rx.used()).collect();
        used.into_iter()
            .map(|(head, len)| self.packet(head, len))
            .collect()
    }

    fn packet(&mut self, head: u16, len: u32) -> (Header, Vec<u8>) {
        let (address, capacity) = self.buffers.remove(&head).unwrap();
        let mut bytes = vec![0; len as usize];
        self.mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        let (header, payload) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
        let header = Header::parse(header);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
        assert_eq!(header.len as usize, payload.len());
        let payload = payload.to_vec();
        self.offer(1, capacity);
        (header, payload)
    }

    /// The only packet received since the last call, without payload: its operation.
    #[track_caller]
    fn control(&mut self) -> Header {
        let packets = self.received();
        assert_eq!(packets.len(), 1, "{packets:?}");
        let (header, payload) = packets.into_iter().next().unwrap();
        assert!(payload.is_empty());
        header
    }

    /// All payload received since the last call.
    fn data(&mut self) -> Vec<u8> {
        self.received()
            .into_iter()
            .flat_map(|(_, payload)| payload)
            .collect()
    }

    /// Sends bytes as one packet, in two pieces.
    fn send_bytes(&mut self, header: &[u8], payload: &[u8]) {
        self.mem.write_slice(header, GuestAddress(SENT)).unwrap();
        self.mem.write_slice(payload, GuestAddress(SENT + 64)).unwrap();
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
        self.tx
            .offer(&[readable(SENT, len(header)), readable(SENT + 64, len(payload))]);
        self.kick(TX);
        assert!(self.tx.used().is_some());
    }

    fn send_header(&mut self, header: Header, payload: &[u8]) {
        self.send_bytes(&header.to_bytes(), payload);
    }

    fn send(&mut self, op: Op, ports: Ports) {
        self.send_header(packet(op, ports), &[]);
    }

    fn send_data(&mut self, ports: Ports, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap();
        self.send_header(
            Header {
                len,
                ..packet(Op::Data, ports)
            },
            payload,
        );
    }

    fn shut_down(&mut self, ports: Ports, flags: u32) {
        self.send_header(
            Header {
                flags,
                ..packet(Op::Shutdown, ports)
            },
            &[],
        );
    }

    /// Gives the device credit: what the guest has passed on so far.
    fn credit(&mut self, ports: Ports, fwd_cnt: u32) {
        self.send_header(
            Header {
                fwd_cnt,
                ..packet(Op::CreditUpdate, ports)
            },
            &[],
        );
    }

    fn path(&self) -> PathBuf {
        self.folder.as_path().join("v")
    }

    /// A host program that waits for the guest's connections to `port`.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.as_path().join(format!("v_{port}"))).unwrap()
    }

    /// A host program that has connected, and says `greeting`.
    fn program(&self, greeting: &str) -> UnixStream {
        let mut program = UnixStream::connect(self.path()).unwrap();
        program.write_all(greeting.as_bytes()).unwrap();
        program
    }

    /// A connection that a host program began: to port 52 of the guest.
    fn connected(&mut self) -> (UnixStream, Ports) {
        let mut program = self.program("CONNECT 52\n");
        self.poll();
        let request = self.control();
        assert_eq!((request.op, request.dst_port), (Op::Request as u16, 52));
        let ports = Ports {
            host: request.src_port,
            guest: 52,
        };
        self.send(Op::Response, ports);
        let mut line = vec![0; format!("OK {}\n", ports.host).len()];
        program.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", ports.host).into_bytes());
        program.set_nonblocking(true).unwrap();
        (program, ports)
    }

    /// A connection that the guest began: from its port 1000 to port 80.
    fn accepted(&mut self) -> (UnixStream, Ports) {
        let listener = self.listen(80);
        let ports = Ports {
            host: 80,
            guest: 1000,
        };
        self.send(Op::Request, ports);
        assert_eq!(self.control().op, Op::Response as u16);
        let (program, _) = listener.accept().unwrap();
        program.set_nonblocking(true).unwrap();
        std::fs::remove_file(self.folder.as_path().join("v_80")).unwrap();
        (program, ports)
    }

    fn counter(&self, name: &str) -> u64 {
        self.vsock.metrics()[name].as_u64().unwrap()
    }
}

fn config(uds_path: PathBuf) -> Config {
    Config {
        vsock_id: None,
        guest_cid: CID,
        uds_path,
    }
}

/// A packet of the guest, which can hold 256 KiB.
fn packet(op: Op, ports: Ports) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: ports.guest,
        dst_port: ports.host,
        socket_type: TYPE_STREAM,
        op: op as u16,
        buf_alloc: 256 << 10,
        ..Header::default()
    }
}

/// What a program can read now.
fn read_now(program: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut piece = [0; 65536];
    loop {
        match program.read(&mut piece) {
            Ok(0) => return bytes,
            Ok(len) => bytes.extend_from_slice(&piece[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Whether the program is at the end of what it can read.
fn at_end(program: &mut UnixStream) -> bool {
    matches!(program.read(&mut [0; 1]), Ok(0))
}

/// Works until something is done.
fn until(mut done: impl FnMut() -> bool) {
    assert!((0..10_000).any(|_| done()), "it is never done");
}

/// `len` bytes that tell their places.
fn pattern(len: usize) -> Vec<u8> {
    (0..len.div_ceil(4))
        .flat_map(|word| u32::try_from(word).unwrap().to_le_bytes())
        .take(len)
        .collect()
}
