//! Credit, fairness and batches.

use super::super::muxer::RETRY_PAUSE;
use super::super::packet::MAX_PAYLOAD;
use super::*;

/// Writes what the socket takes; returns how much that was.
fn write_now(program: &mut UnixStream, bytes: &[u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match program.write(&bytes[done..]) {
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    done
}

#[test]
fn moves_a_megabyte_to_the_guest_within_its_credit() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    let sent = pattern(1 << 20);
    let (mut written, mut received) = (0, Vec::new());
    until(|| {
        written += write_now(&mut program, &sent[written..]);
        guest.poll();
        received.extend(guest.data());
        guest.credit(ports, u32::try_from(received.len()).unwrap());
        received.len() == sent.len()
    });
    assert!(received == sent);
}

#[test]
fn moves_a_megabyte_to_the_program_within_the_devices_credit() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    let sent = pattern(1 << 20);
    let (mut done, mut told, mut received) = (0, 0, Vec::new());
    until(|| {
        let free = BUF_ALLOC as usize - (done - told);
        let len = free.min(50_001).min(sent.len() - done);
        if len > 0 {
            guest.send_data(ports, &sent[done..done + len]);
            done += len;
        } else {
            received.extend(read_now(&mut program));
        }
        guest.poll();
        if let Some((header, _)) = guest.received().last() {
            told = header.fwd_cnt as usize;
        }
        received.len() == sent.len()
    });
    assert!(received == sent);
    assert_eq!(guest.counter("conns_killed"), 0);
}

#[test]
fn fills_many_buffers_with_one_interrupt() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, _) = guest.connected();
    guest.recorder.take_interrupts();
    let sent = pattern(20_000);
    assert_eq!(write_now(&mut program, &sent), sent.len());
    guest.poll();
    assert_eq!(guest.recorder.take_interrupts(), 1);
    let packets = guest.received();
    // Each buffer has place for a header beside.
    let lengths: Vec<_> = packets.iter().map(|(header, _)| header.len).collect();
    assert_eq!(lengths, [4052, 44, 4052, 4052, 88, 4052, 3660]);
    let data: Vec<u8> = packets.into_iter().flat_map(|(_, payload)| payload).collect();
    assert!(data == sent);
}

#[test]
fn uses_large_buffers_for_large_packets() {
    let mem = ram();
    let mut guest = Guest::without_buffers(&mem);
    guest.offer(8, 44 + MAX_PAYLOAD);
    let (mut program, _) = guest.connected();
    let sent = pattern(150_000);
    assert_eq!(write_now(&mut program, &sent), sent.len());
    guest.poll();
    let lengths: Vec<_> = guest.received().iter().map(|(header, _)| header.len).collect();
    assert_eq!(lengths, [4096, 8192, 16384, 32768, 65536, 23024]);
}

#[test]
fn stops_at_the_end_of_credit_and_asks_for_more_once() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    guest.send_header(
        Header {
            buf_alloc: 1000,
            ..packet(Op::CreditUpdate, ports)
        },
        &[],
    );
    write_now(&mut program, &pattern(1500));
    guest.poll();
    guest.poll();
    let packets = guest.received();
    let ops: Vec<_> = packets
        .iter()
        .map(|(header, _)| (header.op, header.len))
        .collect();
    assert_eq!(ops, [(Op::Data as u16, 1000), (Op::CreditRequest as u16, 0)]);
    guest.send_header(
        Header {
            buf_alloc: 1000,
            fwd_cnt: 600,
            ..packet(Op::CreditUpdate, ports)
        },
        &[],
    );
    assert_eq!(guest.data(), pattern(1500)[1000..]);
}

#[test]
fn a_program_that_does_not_read_holds_up_its_own_connection_only() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (_slow, slow) = guest.connected();
    let (mut quick, ports) = guest.connected();
    for _ in 0..4 {
        guest.send_data(slow, &pattern(65_536));
    }
    guest.send_data(ports, b"through");
    assert_eq!(read_now(&mut quick), b"through");
    assert_eq!(guest.counter("conns_killed"), 0);
}

#[test]
fn data_for_which_the_host_had_no_memory_is_written_later() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    for _ in 0..4 {
        guest.send_data(ports, &pattern(65_000));
    }
    let first = read_now(&mut program);
    assert!(
        first.len() < 4 * 65_000,
        "the socket has taken everything at once"
    );
    // As after a write that the host refused for want of memory: no event comes, the time does.
    guest.vsock.muxer.set_deadline(0, RETRY_PAUSE);
    guest.vsock.muxer.expire(std::time::Instant::now() + RETRY_PAUSE);
    let rest = read_now(&mut program);
    assert!([first, rest].concat() == pattern(65_000).repeat(4));
    assert_eq!(guest.counter("conns_killed"), 0);
}

#[test]
fn a_guest_that_gives_no_credit_holds_up_its_own_connection_only() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut held, ports) = guest.connected();
    let (mut quick, _) = guest.connected();
    guest.send_header(
        Header {
            buf_alloc: 0,
            ..packet(Op::CreditUpdate, ports)
        },
        &[],
    );
    write_now(&mut held, b"held");
    write_now(&mut quick, b"through");
    guest.poll();
    assert_eq!(guest.data(), b"through");
}

#[test]
fn connections_take_turns() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let mut programs = [0; 3].map(|_| guest.connected());
    for (program, _) in &mut programs {
        assert_eq!(write_now(program, &pattern(12_288)), 12_288);
    }
    guest.poll();
    let order: Vec<_> = guest
        .received()
        .iter()
        .map(|(header, _)| header.src_port)
        .collect();
    let firsts: Vec<_> = order.iter().step_by(2).take(3).collect();
    assert_eq!(order.len(), 15);
    assert!(
        firsts[0] != firsts[1] && firsts[1] != firsts[2] && firsts[0] != firsts[2],
        "{order:?}"
    );
}

#[test]
fn serves_no_more_than_a_turn_at_once() {
    let mem = ram();
    let mut guest = Guest::without_buffers(&mem);
    guest.offer(250, 4096);
    let mut programs: Vec<_> = (0..30).map(|_| guest.connected()).collect();
    for (program, _) in &mut programs {
        write_now(program, &pattern(16_384));
    }
    guest.call(|vsock, io| vsock.on_event(0, io)).unwrap();
    assert_eq!(guest.again, Some(TX));
    guest.work();
    assert_eq!(guest.again, None);
}

#[test]
fn takes_all_packets_of_a_kick_with_one_interrupt() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    while guest.tx.used().is_some() {}
    guest.recorder.take_interrupts();
    let header = Header {
        len: 4,
        ..packet(Op::Data, ports)
    };
    mem.write_slice(&header.to_bytes(), GuestAddress(SENT)).unwrap();
    mem.write_slice(b"data", GuestAddress(SENT + 44)).unwrap();
    for _ in 0..100 {
        guest.tx.offer(&[readable(SENT, 48)]);
    }
    guest.kick(TX);
    assert_eq!(read_now(&mut program), b"data".repeat(100));
    assert_eq!(guest.recorder.take_interrupts(), 1);
    assert_eq!(std::iter::from_fn(|| guest.tx.used()).count(), 100);
}

#[test]
fn does_nothing_when_nothing_happens() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let _open = [0; 3].map(|_| guest.connected());
    guest.recorder.take_interrupts();
    for _ in 0..3 {
        guest.poll();
        guest.kick(RX);
        guest.kick(TX);
    }
    assert_eq!((guest.received(), guest.again), (vec![], None));
    assert_eq!(guest.recorder.take_interrupts(), 0);
}
