//! The connection by itself, with a peer that does what a test says.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixListener;

use vm_memory::VolatileSlice;
use vmm_sys_util::tempdir::TempDir;

use super::*;

/// A peer and a connection to it.
struct Pair {
    passt: Passt,
    peer: UnixStream,
    listener: UnixListener,
    _folder: TempDir,
}

fn pair() -> Pair {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let passt = Passt::connect(&path).unwrap();
    let (peer, _) = listener.accept().unwrap();
    Pair {
        passt,
        peer,
        listener,
        _folder: folder,
    }
}

/// A frame of `len` bytes as it is on the wire.
fn wired(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = u32::try_from(len).unwrap().to_be_bytes().to_vec();
    bytes.extend(frame(len, seed));
    bytes
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0u8..=250)
        .cycle()
        .map(|b| b.wrapping_add(seed))
        .take(len)
        .collect()
}

impl Pair {
    /// Receives with `room` bytes of the guest: what the guest's driver would see, header and frame.
    fn receive(&mut self, room: usize) -> io::Result<Vec<u8>> {
        let (mut near, mut rest) = (vec![0xaa; room], vec![0xaa; MAX_FRAME_LEN]);
        let mut buffers = Buffers::new();
        buffers.push(&VolatileSlice::from(&mut near[..]));
        let len = self.passt.receive(&mut buffers, &mut rest)?;
        near.extend(rest);
        if len < room {
            near.truncate(len);
        }
        near.truncate(len);
        Ok(near)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<usize> {
        let mut bytes = vec![0xaa; HEADER_LEN];
        bytes.extend(frame);
        let mut buffers = Buffers::new();
        buffers.push(&VolatileSlice::from(&mut bytes[..]));
        self.passt.send(&buffers)
    }

    fn read_peer(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.peer.read_exact(&mut bytes).unwrap();
        bytes
    }
}

/// What the driver sees of a frame.
fn seen(frame: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_LEN];
    bytes.extend(frame);
    bytes
}

#[test]
fn receives_frames_that_come_together() {
    let mut pair = pair();
    let together = [wired(60, 1), wired(1514, 2), wired(14, 3)].concat();
    pair.peer.write_all(&together).unwrap();
    assert_eq!(pair.receive(2000).unwrap(), seen(&frame(60, 1)));
    assert_eq!(pair.receive(2000).unwrap(), seen(&frame(1514, 2)));
    assert_eq!(pair.receive(2000).unwrap(), seen(&frame(14, 3)));
    assert_eq!(pair.receive(2000).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(pair.passt.is_connected());
}

#[test]
fn receives_a_frame_that_comes_byte_by_byte() {
    let mut pair = pair();
    let bytes = wired(60, 1);
    for byte in &bytes[..bytes.len() - 1] {
        pair.peer.write_all(&[*byte]).unwrap();
        assert_eq!(pair.receive(2000).unwrap_err().kind(), ErrorKind::WouldBlock);
    }
    pair.peer.write_all(&bytes[bytes.len() - 1..]).unwrap();
    assert_eq!(pair.receive(2000).unwrap(), seen(&frame(60, 1)));
}

#[test]
fn puts_what_the_guest_has_no_room_for_behind() {
    let mut pair = pair();
    for room in [HEADER_LEN, 13, 72, 73] {
        pair.peer.write_all(&wired(60, 1)).unwrap();
        assert_eq!(pair.receive(room).unwrap(), seen(&frame(60, 1)), "{room}");
    }
}

#[test]
fn receives_more_than_its_buffer_holds_and_the_longest_frames() {
    let mut pair = pair();
    let mut peer = pair.peer.try_clone().unwrap();
    let lengths = [LONGEST, 1514, LONGEST, LONGEST - 1, 14, LONGEST];
    let writer = std::thread::spawn(move || {
        for (len, seed) in lengths.into_iter().zip(0..) {
            peer.write_all(&wired(len, seed)).unwrap();
        }
    });
    for (len, seed) in lengths.into_iter().zip(0..) {
        let received = loop {
            match pair.receive(2000) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::yield_now(),
                result => break result.unwrap(),
            }
        };
        assert!(received == seen(&frame(len, seed)), "frame {seed}");
    }
    writer.join().unwrap();
}

#[test]
fn a_length_that_no_frame_has_ends_the_connection() {
    for length in [0, 13, LONGEST + 1, u32::MAX as usize] {
        let mut pair = pair();
        let length = u32::try_from(length).unwrap().to_be_bytes();
        pair.peer
            .write_all(&[&wired(60, 1)[..], &length].concat())
            .unwrap();
        pair.receive(2000).unwrap();
        let error = pair.receive(2000).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert!(!pair.passt.is_connected());
        assert_eq!(pair.peer.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn sends_frames_together_without_their_virtio_header() {
    let mut pair = pair();
    assert_eq!(pair.send(&frame(60, 1)).unwrap(), 72);
    pair.send(&frame(1514, 2)).unwrap();
    pair.peer.set_nonblocking(true).unwrap();
    assert_eq!(
        pair.peer.read(&mut [0]).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    pair.passt.flush().unwrap();
    let expected = [wired(60, 1), wired(1514, 2)].concat();
    assert_eq!(pair.read_peer(expected.len()), expected);
}

#[test]
fn takes_frames_as_long_as_the_peer_reads_and_loses_none() {
    let mut pair = pair();
    let (mut sent, mut seed) = (Vec::new(), 0u8);
    while pair.passt.has_room() {
        pair.send(&frame(LONGEST, seed)).unwrap();
        pair.passt.flush().unwrap();
        sent.extend(wired(LONGEST, seed));
        seed += 1;
    }
    assert!(!pair.passt.has_room());
    let mut received = vec![0; sent.len()];
    let mut done = 0;
    while done < received.len() {
        done += pair.peer.read(&mut received[done..]).unwrap();
        pair.passt.on_ready().unwrap();
    }
    assert!(pair.passt.has_room() && pair.passt.output.is_empty());
    assert!(received == sent, "the bytes are not the same");
}

#[test]
fn keeps_no_more_than_what_the_peer_has_not_read() {
    let mut pair = pair();
    for seed in 0..100 {
        while pair.passt.has_room() {
            pair.send(&frame(1514, seed)).unwrap();
            pair.passt.flush().unwrap();
        }
        pair.read_peer(BATCH);
        pair.passt.on_ready().unwrap();
    }
    assert!(pair.passt.output.bytes.len() <= 2 * BATCH + 2 * 1518);
}

#[test]
fn is_not_connected_once_the_peer_has_gone_and_finds_it_again() {
    let mut pair = pair();
    pair.peer.write_all(&wired(60, 1)[..30]).unwrap();
    assert_eq!(pair.receive(2000).unwrap_err().kind(), ErrorKind::WouldBlock);
    pair.peer.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(pair.receive(2000).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert!(!pair.passt.is_connected());
    assert_eq!(pair.receive(2000).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(
        pair.send(&frame(60, 1)).unwrap_err().kind(),
        ErrorKind::NotConnected
    );
    pair.passt.flush().unwrap();

    pair.passt.retry();
    assert!(pair.passt.is_connected());
    let (mut peer, _) = pair.listener.accept().unwrap();
    peer.write_all(&wired(60, 2)).unwrap();
    assert_eq!(pair.receive(2000).unwrap(), seen(&frame(60, 2)));
}

#[test]
fn a_peer_that_is_gone_is_noticed_when_sending() {
    let Pair { mut passt, peer, .. } = pair();
    drop(peer);
    let mut bytes = [0; 72];
    let mut buffers = Buffers::new();
    buffers.push(&VolatileSlice::from(&mut bytes[..]));
    passt.send(&buffers).unwrap();
    assert_eq!(passt.flush().unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert!(!passt.is_connected() && passt.output.is_empty());
}

#[test]
fn says_where_nobody_listens() {
    let error = Passt::connect(Path::new("/nonexistent/passt")).err().unwrap();
    assert_eq!(
        error.to_string(),
        "cannot connect to '/nonexistent/passt': is passt running, with --socket and this path?"
    );
}

#[test]
fn has_no_tap_to_move_from() {
    let error = pair().passt.open_other("tap1", 1).err().unwrap().to_string();
    assert!(error.contains("only an interface on a tap can move"), "{error}");
}
