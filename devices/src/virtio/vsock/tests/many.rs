//! As many connections as there may be.

use super::super::MAX_CONNECTIONS;
use super::*;

const MANY: u32 = MAX_CONNECTIONS;

/// Lets this process have a descriptor for each end of every connection.
fn allow_descriptors() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: needed as std has no limits. Both calls are given a structure that lives across them.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
    }
    assert!(
        limit.rlim_max > 3 * u64::from(MANY),
        "ulimit -Hn must be above {}",
        3 * MANY
    );
}

#[test]
fn serves_all_of_them_and_turns_the_next_away() {
    allow_descriptors();
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let mut programs: Vec<_> = (0..MANY).map(|_| guest.connected()).collect();
    let mut late = guest.program("");
    guest.poll();
    assert!(at_end(&mut late));
    let _listener = guest.listen(80);
    guest.send(Op::Request, Ports { host: 80, guest: 1 });
    assert_eq!(guest.control().op, Op::Reset as u16);
    assert_eq!(guest.counter("muxer_event_fails"), 2);

    for (index, (program, _)) in programs.iter_mut().enumerate() {
        program.write_all(&index.to_le_bytes()).unwrap();
    }
    let mut received = Vec::new();
    until(|| {
        guest.poll();
        received.extend(guest.received());
        received.len() == programs.len()
    });
    for (header, payload) in received {
        let index = usize::from_le_bytes(payload.try_into().unwrap());
        assert_eq!(header.src_port, programs[index].1.host);
    }

    // One that leaves makes room for another.
    let (_, ports) = programs.pop().unwrap();
    guest.shut_down(ports, 3);
    assert_eq!(guest.control().op, Op::Reset as u16);
    guest.connected();
}

#[test]
fn takes_a_crowd_that_comes_at_once() {
    allow_descriptors();
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let programs: Vec<_> = (0..400).map(|_| guest.program("CONNECT 52\n")).collect();
    let mut requests = 0;
    guest.call(|vsock, io| vsock.on_event(0, io)).unwrap();
    for _ in 0..100 {
        requests += guest.received().len();
        guest.kick(RX);
        guest.work();
    }
    assert_eq!(requests, programs.len());
}
