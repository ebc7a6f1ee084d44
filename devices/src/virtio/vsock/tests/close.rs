//! Ends of connections: half, whole, orderly and not.

use std::net::Shutdown;

use super::super::muxer::CLOSE_TIMEOUT;
use super::*;

const RECEIVE: u32 = 1;
const SEND: u32 = 2;
const BOTH: u32 = 3;

/// The packets received since the last call, as operations and flags.
fn ops(guest: &mut Guest<'_>) -> Vec<(u16, u32)> {
    guest
        .received()
        .into_iter()
        .map(|(header, _)| (header.op, header.flags))
        .collect()
}

const SHUTDOWN: u16 = Op::Shutdown as u16;
const RESET: u16 = Op::Reset as u16;

#[test]
fn a_program_that_stops_sending_still_receives() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    program.write_all(b"last").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    guest.poll();
    let packets = guest.received();
    assert_eq!(
        (packets[0].1.as_slice(), packets[1].0.flags),
        (&b"last"[..], SEND)
    );
    guest.send_data(ports, b"reply");
    assert_eq!(read_now(&mut program), b"reply");
    guest.shut_down(ports, BOTH);
    assert_eq!(ops(&mut guest), [(RESET, 0)]);
    assert!(at_end(&mut program));
}

#[test]
fn a_guest_that_stops_sending_still_receives() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    guest.send_data(ports, b"last");
    guest.shut_down(ports, SEND);
    assert_eq!(read_now(&mut program), b"last");
    assert!(at_end(&mut program));
    program.write_all(b"reply").unwrap();
    guest.poll();
    assert_eq!(guest.data(), b"reply");
    drop(program);
    guest.poll();
    assert_eq!(ops(&mut guest).last(), Some(&(SHUTDOWN, BOTH)));
}

#[test]
fn a_guest_that_stops_receiving_ends_what_the_program_sends() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    guest.shut_down(ports, RECEIVE);
    let error = program.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    guest.send_data(ports, b"still");
    assert_eq!(read_now(&mut program), b"still");
}

#[test]
fn directions_closed_one_by_one_end_the_connection() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    guest.shut_down(ports, SEND);
    program.shutdown(Shutdown::Write).unwrap();
    guest.poll();
    assert_eq!(ops(&mut guest).last(), Some(&(SHUTDOWN, BOTH)));
    assert!(at_end(&mut program));
    guest.send(Op::Reset, ports);
    assert_eq!((ops(&mut guest), guest.counter("conns_removed")), (vec![], 1));
}

#[test]
fn a_program_that_leaves_is_followed_by_an_orderly_end() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    program.write_all(b"farewell").unwrap();
    drop(program);
    guest.poll();
    let packets = guest.received();
    let data: Vec<u8> = packets.iter().flat_map(|(_, payload)| payload.clone()).collect();
    assert_eq!(data, b"farewell");
    assert_eq!(
        (packets.last().unwrap().0.op, packets.last().unwrap().0.flags),
        (SHUTDOWN, BOTH)
    );
    // Linux answers so when its program has read everything, or has closed too.
    guest.send(Op::Reset, ports);
    assert_eq!(
        (guest.counter("conns_removed"), guest.counter("conns_killed")),
        (1, 0)
    );
}

#[test]
fn both_ends_may_leave_at_once() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (program, ports) = guest.connected();
    drop(program);
    guest.poll();
    assert_eq!(ops(&mut guest).last(), Some(&(SHUTDOWN, BOTH)));
    guest.shut_down(ports, BOTH);
    assert_eq!(ops(&mut guest), [(RESET, 0)]);
    assert_eq!(
        (guest.counter("conns_removed"), guest.counter("conns_killed")),
        (1, 0)
    );
}

#[test]
fn a_guest_that_does_not_end_a_connection_sees_it_ended() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (program, _) = guest.connected();
    drop(program);
    guest.poll();
    ops(&mut guest);
    guest.vsock.muxer.expire(std::time::Instant::now());
    assert_eq!(guest.counter("conns_killed"), 0);
    guest
        .vsock
        .muxer
        .expire(std::time::Instant::now() + CLOSE_TIMEOUT);
    guest.kick(RX);
    assert_eq!(ops(&mut guest), [(RESET, 0)]);
    assert_eq!(
        (guest.counter("conns_removed"), guest.counter("conns_killed")),
        (1, 1)
    );
}

#[test]
fn the_guests_last_data_reaches_a_program_that_reads_late() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    let sent = pattern(60_000);
    let mut amount = 0;
    // More than the socket takes, within the credit.
    for _ in 0..4 {
        guest.send_data(ports, &sent);
        amount += sent.len();
    }
    guest.shut_down(ports, BOTH);
    assert_eq!(ops(&mut guest).last(), Some(&(RESET, 0)));
    // The guest uses its port again, and the old data is not mixed with the new.
    guest.send(Op::Data, ports);
    assert_eq!(ops(&mut guest), [(RESET, 0)]);
    let mut received = Vec::new();
    until(|| {
        received.extend(read_now(&mut program));
        guest.poll();
        received.len() == amount
    });
    assert!(received == sent.repeat(4));
    assert!(at_end(&mut program));
    assert_eq!(
        (guest.counter("conns_removed"), guest.counter("conns_killed")),
        (1, 0)
    );
}

#[test]
fn a_program_that_leaves_while_data_waits_ends_the_wait() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (program, ports) = guest.connected();
    for _ in 0..4 {
        guest.send_data(ports, &pattern(60_000));
    }
    guest.shut_down(ports, BOTH);
    assert_eq!(guest.counter("conns_removed"), 0);
    drop(program);
    guest.poll();
    assert_eq!(guest.counter("conns_removed"), 1);
}

#[test]
fn a_program_that_dies_with_unread_data_resets_the_connection() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (program, ports) = guest.connected();
    guest.send_data(ports, b"unread");
    drop(program);
    guest.poll();
    assert_eq!(ops(&mut guest).last().unwrap().0, RESET);
    assert_eq!(
        (guest.counter("rx_read_fails"), guest.counter("conns_killed")),
        (1, 1)
    );
}

#[test]
fn data_for_a_program_that_is_gone_is_thrown_away() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (program, ports) = guest.connected();
    drop(program);
    guest.send_data(ports, b"too late");
    assert_eq!(guest.counter("tx_write_fails"), 1);
    guest.poll();
    assert_eq!(ops(&mut guest).last(), Some(&(SHUTDOWN, BOTH)));
    guest.send_data(ports, b"later still");
    assert_eq!(ops(&mut guest), []);
}

#[test]
fn a_reset_by_the_guest_ends_the_connection_at_once() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    guest.send(Op::Reset, ports);
    assert!(at_end(&mut program));
    assert_eq!(ops(&mut guest), []);
    assert_eq!(guest.counter("conns_removed"), 1);
}
