use proptest::prelude::{any, prop};
use proptest::{prop_assert, proptest};

use super::*;

#[test]
fn answers_at_its_new_address_after_a_move() {
    let guest = Guest::new();
    guest.write_config(0x14, &0x41u32.to_le_bytes());
    let mut count = [0; 2];
    assert!(!guest.bus.read(BAR + 18, &mut count));
    assert!(guest.bus.read(0x41_0000_0000 + 18, &mut count));
    assert_eq!(count, [2, 0]);
}

#[test]
fn answers_nowhere_while_its_address_clashes_or_decoding_is_off() {
    let guest = Guest::new();
    guest.write_config(0x14, &[0; 4]);
    guest.write_config(0x10, &0xe000_0000u32.to_le_bytes());
    assert!(!guest.bus.read(BAR, &mut [0]));
    assert_eq!(guest.config(0), [0xf4, 0x1a]);
    guest.write_config(0x10, &[0; 4]);
    guest.write_config(0x14, &0x40u32.to_le_bytes());
    assert!(guest.bus.read(BAR, &mut [0]));
    guest.write_config(4, &[0]);
    assert!(!guest.bus.read(BAR, &mut [0]));
}

#[test]
fn keeps_its_place_while_its_bar_is_sized() {
    let guest = Guest::new();
    guest.write_config(4, &[0, 0]);
    guest.write_config(0x10, &[0xff; 4]);
    guest.write_config(0x14, &[0xff; 4]);
    assert_eq!(
        (guest.config(0x10), guest.config(0x14)),
        ([0x04, 0x80, 0xff, 0xff], [0xff; 4])
    );
    guest.write_config(0x10, &[0; 4]);
    guest.write_config(0x14, &0x40u32.to_le_bytes());
    guest.write_config(4, &[6, 0]);
    assert_eq!(guest.get(18), [2, 0]);
}

#[test]
fn passes_writes_to_the_device_configuration_on() {
    let guest = Guest::new();
    guest.start();
    guest.set(DEVICE_OFFSET + 4, b"XY");
    guest.set(DEVICE_OFFSET, b"Z");
    assert_eq!(&guest.get::<6>(DEVICE_OFFSET), b"confXY");
    guest.set(TABLE_OFFSET - 1, b"Z");
    assert_eq!(guest.get(TABLE_OFFSET - 1), [0]);
}

#[test]
fn reaches_its_bar_through_configuration_space() {
    let guest = Guest::new();
    let window = guest.capability(9, Some(cap::PCI));
    guest.write_config(window + 4, &[0]);
    guest.write_config(window + 8, &20u32.to_le_bytes());
    guest.write_config(window + 12, &1u32.to_le_bytes());
    guest.write_config(window + 16, &[1, 2, 3, 4]);
    assert_eq!(guest.status(), 1);
    guest.write_config(window + 8, &18u32.to_le_bytes());
    guest.write_config(window + 12, &2u32.to_le_bytes());
    assert_eq!(guest.config(window + 16), [2, 0]);
}

#[test]
fn looks_nowhere_through_a_window_outside_its_bar() {
    let guest = Guest::new();
    let window = guest.capability(9, Some(cap::PCI));
    guest.write_config(window + 12, &4u32.to_le_bytes());
    guest.write_config(window + 8, &u32::MAX.to_le_bytes());
    guest.write_config(window + 16, &[1, 2, 3, 4]);
    assert_eq!(guest.config(window + 16), [1, 2, 3, 4]);
    guest.write_config(window + 8, &[0; 4]);
    guest.write_config(window + 4, &[1]);
    assert_eq!(guest.config(window + 16), [1, 2, 3, 4]);
}

#[test]
fn takes_ring_addresses_whole_and_in_parts() {
    let guest = Guest::new();
    guest.negotiate();
    guest.set(32, &0x1122_3344_5566_7788u64.to_le_bytes());
    guest.set(36, &0xaabb_ccddu32.to_le_bytes());
    guest.set(33, &[0, 1]);
    guest.set(38, &[1, 2, 3, 4]);
    assert_eq!(u64::from_le_bytes(guest.get(32)), 0xaabb_ccdd_5501_0088);
}

#[test]
fn ignores_fields_that_the_driver_must_not_write() {
    let guest = Guest::new();
    guest.negotiate();
    guest.set(4, &[0xff; 4]);
    guest.set(18, &[9, 9]);
    guest.set(21, &[9]);
    guest.set(30, &[9, 9]);
    guest.set(28, &[2, 0]);
    guest.set(ISR_OFFSET, &[3]);
    assert_eq!(
        (guest.get(18), guest.get(21), guest.get(28)),
        ([2, 0], [0], [0, 0])
    );
    assert_eq!((guest.get(30), guest.get(ISR_OFFSET)), ([0, 0], [0]));
}

#[test]
fn refuses_a_misaligned_bar() {
    let memory = SharedMemory::new(memory(0x1000));
    let resources = PciResources {
        bar_address: 0x1000,
        notify_ports: 0x1000,
        interrupt_line: 0,
        router: Arc::<Router>::default(),
        intx: Arc::<Wire>::default(),
    };
    let made = PciVirtio::new(Box::new(Echo::new()), resources, memory, Arc::<Inline>::default());
    assert_eq!(
        made.err().map(|error| error.kind()),
        Some(io::ErrorKind::InvalidInput)
    );
}

/// Offsets where registers are.
const REGIONS: [u64; 8] = [0, 16, 32, 0x1000, 0x2000, 0x3000, 0x4000, 0x6000];

proptest! {
    #[test]
    fn survives_any_accesses(
        started in any::<bool>(),
        accesses in prop::collection::vec(
            (0usize..9, 0u64..0x40, prop::collection::vec(any::<u8>(), 0..10), any::<bool>()),
            1..60,
        ),
    ) {
        let guest = Guest::new();
        if started {
            guest.start();
        }
        let mut function = guest.function.lock().unwrap();
        for (region, offset, mut data, write) in accesses {
            let register = u16::try_from(offset * 4 + offset % 4).unwrap();
            match (REGIONS.get(region), write) {
                (Some(base), true) => function.write(base + offset, &data),
                (Some(base), false) => function.read(base + offset, &mut data),
                (None, true) => function.write_config(register, &data),
                (None, false) => function.read_config(register, &mut data),
            }
        }
        function.write(20, &[0]);
        prop_assert!(guest.host.is_empty());
    }

    #[test]
    fn survives_any_offset(offset in any::<u64>(), register in any::<u16>(), len in 0usize..10) {
        let guest = Guest::new();
        let mut function = guest.function.lock().unwrap();
        let mut data = vec![0x5a; len];
        function.read(offset, &mut data);
        function.write(offset, &data);
        function.read_config(register, &mut data);
        function.write_config(register, &data);
    }
}
