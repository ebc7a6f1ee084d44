//! Connections that programs of the host begin.

use std::time::Instant;

use super::super::muxer::REQUEST_TIMEOUT;
use super::*;

#[test]
fn connects_a_program_to_the_port_that_it_names() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (_program, ports) = guest.connected();
    assert!(ports.host >= 1 << 30);
    assert_eq!(
        (guest.counter("conns_added"), guest.counter("conns_removed")),
        (1, 0)
    );
}

#[test]
fn moves_data_both_ways() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    program.write_all(b"hello").unwrap();
    guest.poll();
    assert_eq!(guest.data(), b"hello");
    guest.send_data(ports, b"world");
    assert_eq!(read_now(&mut program), b"world");
    let counts = ["rx_bytes_count", "tx_bytes_count"].map(|name| guest.counter(name));
    assert_eq!(counts, [5, 5]);
}

#[test]
fn data_behind_the_line_waits_for_the_guests_answer() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let mut program = guest.program("CONNECT 52\nearly");
    guest.poll();
    let request = guest.control();
    let ports = Ports {
        host: request.src_port,
        guest: 52,
    };
    program.write_all(b" bird").unwrap();
    guest.poll();
    assert_eq!(guest.received(), []);
    guest.send(Op::Response, ports);
    assert_eq!(guest.data(), b"early bird");
}

#[test]
fn a_line_may_come_in_pieces() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let mut program = guest.program("CONN");
    guest.poll();
    program.write_all(b"ECT 7").unwrap();
    guest.poll();
    assert_eq!(guest.received(), []);
    program.write_all(b"\n").unwrap();
    guest.poll();
    assert_eq!(guest.control().dst_port, 7);
}

#[test]
fn closes_on_a_program_that_asks_for_something_else() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let mut program = guest.program("HELO\n");
    guest.poll();
    let mut answer = Vec::new();
    // What was not read makes it a reset.
    let _ = program.read_to_end(&mut answer);
    assert_eq!((answer, guest.received()), (vec![], vec![]));
    assert_eq!(
        (guest.counter("conn_event_fails"), guest.counter("conns_added")),
        (1, 0)
    );
}

#[test]
fn a_port_that_the_guest_refuses_ends_the_connection() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let mut program = guest.program("CONNECT 52\n");
    guest.poll();
    let host = guest.control().src_port;
    guest.send(Op::Reset, Ports { host, guest: 52 });
    assert!(at_end(&mut program));
    assert_eq!(guest.received(), []);
    assert_eq!(
        (guest.counter("conns_removed"), guest.counter("conns_killed")),
        (1, 0)
    );
}

#[test]
fn a_program_that_leaves_before_the_answer_is_forgotten() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let program = guest.program("CONNECT 52\n");
    guest.poll();
    let host = guest.control().src_port;
    drop(program);
    guest.poll();
    assert_eq!(guest.control().op, Op::Reset as u16);
    guest.send(Op::Response, Ports { host, guest: 52 });
    assert_eq!(guest.control().op, Op::Reset as u16);
}

#[test]
fn a_program_may_close_its_direction_before_the_answer() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let mut program = guest.program("CONNECT 52\nquestion");
    program.shutdown(std::net::Shutdown::Write).unwrap();
    guest.poll();
    let host = guest.control().src_port;
    let ports = Ports { host, guest: 52 };
    guest.send(Op::Response, ports);
    let packets = guest.received();
    assert_eq!(packets[0].1, b"question");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (Op::Shutdown as u16, 2));
    guest.send_data(ports, b"answer");
    program.set_nonblocking(true).unwrap();
    assert_eq!(read_now(&mut program), format!("OK {host}\nanswer").into_bytes());
}

#[test]
fn a_request_that_the_guest_does_not_answer_ends_in_time() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let mut program = guest.program("CONNECT 52\n");
    guest.poll();
    let host = guest.control().src_port;
    program.set_nonblocking(true).unwrap();
    guest.vsock.muxer.expire(Instant::now());
    assert!(!at_end(&mut program));
    guest.vsock.muxer.expire(Instant::now() + REQUEST_TIMEOUT);
    assert!(at_end(&mut program));
    guest.kick(RX);
    assert_eq!(guest.control().op, Op::Reset as u16);
    assert_eq!(guest.counter("conns_killed"), 1);
    guest.send(Op::Response, Ports { host, guest: 52 });
    assert_eq!(guest.control().op, Op::Reset as u16);
}

#[test]
fn the_time_to_answer_begins_when_the_guest_has_the_request() {
    let mem = ram();
    let mut guest = Guest::without_buffers(&mem);
    let mut program = guest.program("CONNECT 52\n");
    guest.poll();
    program.set_nonblocking(true).unwrap();
    guest.vsock.muxer.expire(Instant::now() + REQUEST_TIMEOUT);
    assert!(!at_end(&mut program));
    guest.offer(2, 4096);
    guest.kick(RX);
    assert_eq!(guest.control().op, Op::Request as u16);
    guest.vsock.muxer.expire(Instant::now() + REQUEST_TIMEOUT);
    assert!(at_end(&mut program));
}

#[test]
fn an_accepted_request_has_no_time_out() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    guest.vsock.muxer.expire(Instant::now() + REQUEST_TIMEOUT);
    guest.send_data(ports, b"still here");
    assert_eq!(read_now(&mut program), b"still here");
}

#[test]
fn gives_each_connection_a_port_of_its_own() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let programs = [0; 4].map(|_| guest.connected());
    let mut hosts = programs.map(|(_, ports)| ports.host);
    hosts.sort_unstable();
    assert!(hosts.windows(2).all(|pair| pair[0] != pair[1]), "{hosts:?}");
}

#[test]
fn waits_for_receive_buffers_and_asks_to_hear_of_them() {
    let mem = ram();
    let mut guest = Guest::without_buffers(&mem);
    let _program = guest.program("CONNECT 52\n");
    guest.poll();
    assert_eq!((guest.rx.used(), guest.rx.notify_wish().0), (None, 0));
    guest.offer(1, 4096);
    guest.kick(RX);
    assert_eq!(guest.control().op, Op::Request as u16);
    assert_eq!(guest.rx.notify_wish().0, 1);
}
