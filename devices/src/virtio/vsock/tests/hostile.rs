//! A guest that breaks the rules.

use super::*;

#[test]
fn drops_and_counts_packets_that_are_none() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let sound = packet(Op::Request, Ports { host: 80, guest: 1 });
    guest.send_bytes(&[], &[]);
    guest.send_bytes(&sound.to_bytes()[..43], &[]);
    guest.send_header(Header { op: 0, ..sound }, &[]);
    guest.send_header(Header { op: 8, ..sound }, &[]);
    guest.send_header(Header { src_cid: 8, ..sound }, &[]);
    assert_eq!(guest.received(), []);
    let counts = ["tx_queue_event_fails", "tx_packets_count"].map(|name| guest.counter(name));
    assert_eq!(counts, [5, 0]);
}

#[test]
fn answers_other_kinds_of_sockets_with_a_reset() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let ports = Ports { host: 80, guest: 1 };
    for socket_type in [0, 2, 9] {
        guest.send_header(
            Header {
                socket_type,
                ..packet(Op::Request, ports)
            },
            &[],
        );
        let reset = guest.control();
        assert_eq!((reset.op, reset.socket_type), (Op::Reset as u16, socket_type));
    }
}

#[test]
fn answers_for_hosts_that_do_not_exist() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let elsewhere = Header {
        dst_cid: 9,
        ..packet(Op::Request, Ports { host: 80, guest: 1 })
    };
    guest.send_header(elsewhere, &[]);
    let (head, _) = guest.rx.used().unwrap();
    let mut bytes = [0; HEADER_LEN];
    let (address, _) = guest.buffers[&head];
    mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    let reset = Header::parse(&bytes);
    assert_eq!(
        (reset.src_cid, reset.dst_cid, reset.op),
        (9, CID.into(), Op::Reset as u16)
    );
}

#[test]
fn answers_unknown_connections_with_a_reset_but_not_resets() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let ports = Ports { host: 80, guest: 1 };
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send(op, ports);
        assert_eq!(guest.control().op, Op::Reset as u16);
    }
    guest.send(Op::Reset, ports);
    assert_eq!(guest.received(), []);
}

#[test]
fn resets_a_connection_whose_packet_lies_about_its_length() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    let lie = Header {
        len: 100,
        ..packet(Op::Data, ports)
    };
    guest.send_header(lie, &[1; 99]);
    assert_eq!(guest.control().op, Op::Reset as u16);
    assert!(at_end(&mut program));
    assert_eq!(guest.counter("conns_killed"), 1);
}

#[test]
fn passes_on_no_more_than_the_header_says() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    let short = Header {
        len: 3,
        ..packet(Op::Data, ports)
    };
    guest.send_header(short, b"abcdef");
    assert_eq!(read_now(&mut program), b"abc");
}

#[test]
fn resets_a_connection_that_sends_beyond_its_credit() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut program, ports) = guest.connected();
    // What the socket takes does not count.
    let sent = (0..100).take_while(|_| {
        guest.send_data(ports, &pattern(65_536));
        guest.counter("conns_killed") == 0
    });
    assert!((4..12).contains(&sent.count()));
    assert_eq!(guest.received().last().unwrap().0.op, Op::Reset as u16);
    read_now(&mut program);
    assert!(at_end(&mut program));
}

#[test]
fn resets_a_connection_that_is_asked_for_twice_or_answered_unasked() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    for op in [Op::Request, Op::Response] {
        let (mut program, ports) = guest.connected();
        guest.send(op, ports);
        assert_eq!(guest.control().op, Op::Reset as u16);
        assert!(at_end(&mut program));
    }
}

#[test]
fn resets_a_connection_that_speaks_before_its_answer_or_after_its_end() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let _program = guest.program("CONNECT 52\n");
    guest.poll();
    let host = guest.control().src_port;
    guest.send_data(Ports { host, guest: 52 }, b"x");
    assert_eq!(guest.control().op, Op::Reset as u16);
    let (_program, ports) = guest.connected();
    guest.shut_down(ports, 2);
    guest.send_data(ports, b"x");
    assert_eq!(guest.control().op, Op::Reset as u16);
}

#[test]
fn stops_taking_packets_while_their_answers_find_no_room() {
    let mem = ram();
    let mut guest = Guest::without_buffers(&mem);
    let header = packet(Op::Data, Ports { host: 80, guest: 1 });
    mem.write_slice(&header.to_bytes(), GuestAddress(SENT)).unwrap();
    let mut taken = 0;
    for _ in 0..3 {
        for _ in 0..200 {
            guest.tx.offer(&[readable(SENT, 44)]);
        }
        guest.kick(TX);
        guest.work();
        taken += std::iter::from_fn(|| guest.tx.used()).count();
        if taken == 256 {
            break;
        }
    }
    assert_eq!(taken, 256);
    // Room for some answers lets the waiting packets through.
    guest.offer(200, 4096);
    guest.kick(RX);
    guest.work();
    assert_eq!(std::iter::from_fn(|| guest.rx.used()).count(), 200);
    assert_eq!(std::iter::from_fn(|| guest.tx.used()).count(), 144);
}

#[test]
fn gives_buffers_back_that_hold_no_packet() {
    let mem = ram();
    let mut guest = Guest::without_buffers(&mem);
    guest.offer(1, 44);
    guest.rx.offer(&[readable(BUFFERS, 4096)]);
    guest.offer(1, 45);
    let _program = guest.program("CONNECT 52\n");
    guest.poll();
    let lengths: Vec<_> = std::iter::from_fn(|| guest.rx.used())
        .map(|(_, len)| len)
        .collect();
    assert_eq!(lengths, [0, 0, 44]);
    assert_eq!(guest.counter("rx_queue_event_fails"), 2);
}

#[test]
fn needs_a_reset_after_a_broken_queue() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    guest.tx.set_avail_index(SIZE + 1);
    assert!(guest.call(|vsock, io| vsock.on_queue(TX, io)).is_err());
    guest.rx.set_avail_index(SIZE + 80);
    let _program = guest.program("CONNECT 52\n");
    assert!(guest.call(|vsock, io| vsock.on_event(0, io)).is_err());
    guest.event.set_avail_index(SIZE + 1);
    guest.vsock.reset_due = true;
    assert!(guest.call(|vsock, io| vsock.on_queue(EVENT, io)).is_err());
    let counts = ["tx", "rx", "ev"].map(|queue| guest.counter(&format!("{queue}_queue_event_fails")));
    assert_eq!(counts, [1, 1, 1]);
}
