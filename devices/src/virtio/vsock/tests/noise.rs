use proptest::prelude::*;

use super::*;

/// Packets that are nearly right.
fn any_packet() -> impl Strategy<Value = (Header, usize)> {
    let ports = (0u32..3, 0u32..3);
    let kind = (0u16..9, prop_oneof![9 => Just(1u16), 1 => any::<u16>()], 0u32..4);
    let credit = (prop_oneof![Just(0u32), Just(1 << 18), any::<u32>()], any::<u32>());
    (ports, kind, credit, 0u32..300, 0usize..300).prop_map(
        |((host, guest), (op, socket_type, flags), (buf_alloc, fwd_cnt), len, payload)| {
            let header = Header {
                op,
                socket_type,
                flags,
                buf_alloc,
                fwd_cnt,
                len: if op == Op::Data as u16 { len } else { 0 },
                ..packet(
                    Op::Data,
                    Ports {
                        host: 80 + host,
                        guest,
                    },
                )
            };
            (header, payload)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn survives_any_packets(packets in prop::collection::vec(any_packet(), 0..60)) {
        let mem = ram();
        let mut guest = Guest::new(&mem);
        let listeners = [80, 81].map(|port| guest.listen(port));
        let mut programs = Vec::new();
        for (index, (header, payload)) in packets.iter().enumerate() {
            guest.send_header(*header, &vec![7; *payload]);
            for listener in &listeners {
                listener.set_nonblocking(true).unwrap();
                programs.extend(listener.accept().map(|(program, _)| program));
            }
            if index % 7 == 3 {
                programs.pop();
            }
            for program in &mut programs {
                program.set_nonblocking(true).unwrap();
                let _ = program.write(b"some");
                let _ = program.read(&mut [0; 64]);
            }
            guest.poll();
            while let Some((head, _)) = guest.rx.used() {
                let (_, len) = guest.buffers.remove(&head).unwrap();
                guest.offer(1, len);
            }
        }
        prop_assert!(guest.counter("conns_removed") <= guest.counter("conns_added"));
    }

    #[test]
    fn survives_any_rings(
        rings in prop::collection::vec((0u64..0x1800, any::<[u8; 4]>()), 0..64),
        avail in any::<[u16; 3]>(),
    ) {
        let mem = ram();
        let mut guest = Guest::new(&mem);
        let _program = guest.program("CONNECT 52\n");
        for (offset, bytes) in &rings {
            for base in [0x1000, 0x1_0000, 0x2_0000] {
                mem.write_slice(bytes, GuestAddress(base + offset)).unwrap();
            }
        }
        guest.rx.set_avail_index(avail[0] % 512);
        guest.tx.set_avail_index(avail[1] % 512);
        guest.event.set_avail_index(avail[2] % 512);
        guest.vsock.reset_due = true;
        let _ = guest.call(|vsock, io| vsock.on_event(0, io));
        for queue in [RX, TX, EVENT] {
            let _ = guest.call(|vsock, io| vsock.on_queue(queue, io));
        }
    }
}
