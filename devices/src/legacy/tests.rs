use std::io;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::{any, prop_assert_eq, proptest};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::i8042::I8042;
use super::rtc::Rtc;
use super::serial::Serial;
use crate::bus::BusDevice;

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn access(device: &mut dyn BusDevice, accesses: &[(u64, Vec<u8>)]) {
    for (offset, bytes) in accesses {
        device.write(*offset, bytes);
        device.read(*offset, &mut bytes.clone());
    }
}

proptest! {
    #[test]
    fn any_accesses_leave_a_serial_port_that_can_be_saved_and_loaded(
        accesses in vec((0_u64..9, vec(any::<u8>(), 0..5)), 0..200),
        input in vec(any::<u8>(), 0..100),
    ) {
        let mut serial = Serial::new(Box::new(io::sink()), event()).unwrap();
        serial.enqueue(&input);
        access(&mut serial, &accesses);
        let saved = serial.save();
        serial.load(saved.clone()).unwrap();
        prop_assert_eq!(serial.save(), saved);
    }

    #[test]
    fn any_accesses_leave_an_i8042_that_can_be_saved_and_loaded(
        accesses in vec((0_u64..6, vec(any::<u8>(), 0..5)), 0..200),
    ) {
        let mut i8042 = I8042::new(event(), event());
        access(&mut i8042, &accesses);
        let saved = i8042.save();
        i8042.load(saved.clone()).unwrap();
        prop_assert_eq!(i8042.save(), saved);
    }

    #[test]
    fn any_accesses_at_any_time_leave_a_clock_that_can_be_saved_and_loaded(
        accesses in vec((0_u64..1, vec(any::<u8>(), 2..3)), 0..200),
        low_registers in vec((0_u8..0x10, any::<u8>()), 0..200),
        now in any::<u64>(),
    ) {
        let mut rtc = Rtc::with_clock(Box::new(move || Duration::from_micros(now)));
        let low: Vec<_> = low_registers.into_iter().map(|(index, value)| (0, vec![index, value])).collect();
        access(&mut rtc, &low);
        access(&mut rtc, &accesses);
        let saved = rtc.save();
        rtc.load(saved.clone()).unwrap();
        prop_assert_eq!(rtc.save(), saved);
    }
}
