//! The protocol's state by itself.

use super::super::connection::{Connection, Event, Phase};
use super::super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;

const PORTS: Ports = Ports {
    host: 80,
    guest: 1000,
};

/// A connection that the guest began and the host accepted; the guest can hold 1000 bytes.
fn established() -> Connection {
    let mut connection = Connection::to_host(&with_credit(Op::Request, 1000, 0));
    connection.accept();
    assert_eq!(next(&mut connection), Some(Op::Response));
    connection
}

fn with_credit(op: Op, buf_alloc: u32, fwd_cnt: u32) -> Header {
    Header {
        buf_alloc,
        fwd_cnt,
        ..packet(op, PORTS)
    }
}

fn shutdown(flags: u32) -> Header {
    Header {
        flags,
        ..packet(Op::Shutdown, PORTS)
    }
}

fn next(connection: &mut Connection) -> Option<Op> {
    let has_packet = connection.has_packet();
    let header = connection.next_packet(CID);
    assert_eq!(has_packet, header.is_some());
    header.map(|header| header.check_op())
}

impl Header {
    fn check_op(&self) -> Op {
        let returned = Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            ..*self
        };
        returned.check(CID, 0).unwrap()
    }
}

#[test]
fn asks_the_guest_once_and_is_established_by_its_answer() {
    let mut connection = Connection::to_guest(PORTS);
    assert_eq!(
        (next(&mut connection), next(&mut connection)),
        (Some(Op::Request), None)
    );
    assert_eq!((connection.phase(), connection.may_send()), (Phase::Requested, 0));
    let answer = with_credit(Op::Response, 1000, 0);
    assert_eq!(connection.on_packet(Op::Response, &answer), Event::Accepted);
    assert_eq!(
        (connection.phase(), connection.may_send()),
        (Phase::Established, 1000)
    );
}

#[test]
fn sends_nothing_before_the_host_has_accepted() {
    let mut connection = Connection::to_host(&with_credit(Op::Request, 1000, 0));
    assert_eq!((next(&mut connection), connection.may_send()), (None, 0));
    assert_eq!(
        connection.on_packet(Op::Data, &packet(Op::Data, PORTS)),
        Event::Violated
    );
}

#[test]
fn sends_as_much_as_the_guest_can_hold() {
    let mut connection = established();
    connection.sent(600);
    assert_eq!(connection.may_send(), 400);
    connection.sent(400);
    assert_eq!(connection.may_send(), 0);
    let update = with_credit(Op::CreditUpdate, 1000, 700);
    assert_eq!(connection.on_packet(Op::CreditUpdate, &update), Event::Updated);
    assert_eq!(connection.may_send(), 700);
}

#[test]
fn takes_credit_from_every_packet_and_around_the_end_of_counters() {
    let mut connection = established();
    for step in 0..5u32 {
        let done = step.wrapping_mul(1 << 30);
        connection.sent(1 << 30);
        assert_eq!(connection.may_send(), 0);
        let data = with_credit(Op::Data, 1000, done.wrapping_add(1 << 30));
        assert_eq!(connection.on_packet(Op::Data, &data), Event::Data);
        assert_eq!(connection.may_send(), 1000);
    }
}

#[test]
fn a_guest_that_shrinks_its_buffer_gets_nothing_until_it_has_read() {
    let mut connection = established();
    connection.sent(1000);
    connection.on_packet(Op::CreditUpdate, &with_credit(Op::CreditUpdate, 100, 500));
    assert_eq!(connection.may_send(), 0);
    connection.on_packet(Op::CreditUpdate, &with_credit(Op::CreditUpdate, 100, 950));
    assert_eq!(connection.may_send(), 50);
}

#[test]
fn asks_for_credit_once_until_there_is_some() {
    let mut connection = established();
    connection.sent(1000);
    connection.ask_for_credit();
    connection.ask_for_credit();
    assert_eq!(
        (next(&mut connection), next(&mut connection)),
        (Some(Op::CreditRequest), None)
    );
    connection.on_packet(Op::CreditUpdate, &with_credit(Op::CreditUpdate, 1000, 0));
    connection.ask_for_credit();
    assert_eq!(next(&mut connection), None);
    connection.on_packet(Op::CreditUpdate, &with_credit(Op::CreditUpdate, 1000, 1));
    connection.ask_for_credit();
    assert_eq!(next(&mut connection), Some(Op::CreditRequest));
}

#[test]
fn refuses_more_than_it_said_it_can_hold() {
    let mut connection = established();
    assert!(connection.receive(BUF_ALLOC));
    assert!(!connection.receive(1));
    connection.forward(1);
    assert!(connection.receive(1));
    assert!(!connection.receive(u32::MAX));
}

#[test]
fn tells_of_passed_data_after_half_a_buffer() {
    let mut connection = established();
    assert!(connection.receive(BUF_ALLOC));
    connection.forward(BUF_ALLOC / 2 - 1);
    assert_eq!(next(&mut connection), None);
    connection.forward(1);
    let update = connection.next_packet(CID).unwrap();
    assert_eq!(
        (update.check_op(), update.fwd_cnt),
        (Op::CreditUpdate, BUF_ALLOC / 2)
    );
    assert_eq!((update.buf_alloc, next(&mut connection)), (BUF_ALLOC, None));
}

#[test]
fn data_for_the_guest_tells_of_passed_data_too() {
    let mut connection = established();
    assert!(connection.receive(BUF_ALLOC));
    connection.forward(BUF_ALLOC);
    assert_eq!(connection.data_header(CID).fwd_cnt, BUF_ALLOC);
    assert_eq!(next(&mut connection), None);
}

#[test]
fn answers_a_request_for_credit() {
    let mut connection = established();
    let event = connection.on_packet(Op::CreditRequest, &packet(Op::CreditRequest, PORTS));
    assert_eq!(event, Event::Updated);
    assert_eq!(
        (next(&mut connection), next(&mut connection)),
        (Some(Op::CreditUpdate), None)
    );
}

#[test]
fn tells_each_closed_direction_once() {
    let mut connection = established();
    connection.close_host(SHUTDOWN_SEND);
    let first = connection.next_packet(CID).unwrap();
    assert_eq!((first.check_op(), first.flags), (Op::Shutdown, SHUTDOWN_SEND));
    connection.close_host(SHUTDOWN_SEND);
    assert_eq!(next(&mut connection), None);
    connection.finish();
    let second = connection.next_packet(CID).unwrap();
    assert_eq!((second.check_op(), second.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    assert_eq!(
        (next(&mut connection), connection.phase()),
        (None, Phase::Closing)
    );
}

#[test]
fn collects_what_the_guest_closes() {
    let mut connection = established();
    let event = connection.on_packet(Op::Shutdown, &shutdown(SHUTDOWN_RECEIVE));
    assert_eq!((event, connection.may_send()), (Event::Shutdown, 0));
    assert_eq!(
        connection.on_packet(Op::Data, &packet(Op::Data, PORTS)),
        Event::Data
    );
    connection.on_packet(Op::Shutdown, &shutdown(SHUTDOWN_SEND | 0xf0));
    assert!(connection.guest_is_done());
    assert_eq!(
        connection.on_packet(Op::Data, &packet(Op::Data, PORTS)),
        Event::Violated
    );
}

#[test]
fn ends_by_a_reset_in_every_phase() {
    let reset = packet(Op::Reset, PORTS);
    let mut closing = established();
    closing.finish();
    let connections = [
        Connection::to_guest(PORTS),
        Connection::to_host(&reset),
        established(),
        closing,
    ];
    assert_eq!(
        connections.map(|mut c| c.on_packet(Op::Reset, &reset)),
        [Event::Ended; 4]
    );
}

#[test]
fn is_violated_by_packets_that_have_no_place() {
    let by = |mut connection: Connection, op| connection.on_packet(op, &packet(op, PORTS));
    assert_eq!(by(established(), Op::Request), Event::Violated);
    assert_eq!(by(established(), Op::Response), Event::Violated);
    assert_eq!(by(Connection::to_guest(PORTS), Op::Data), Event::Violated);
    assert_eq!(by(Connection::to_guest(PORTS), Op::CreditUpdate), Event::Violated);
}
