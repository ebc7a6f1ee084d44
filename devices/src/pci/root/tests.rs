use std::sync::Weak;

use super::*;
use crate::pci::config_space::command;

const BAR: u64 = 0x40_0000_0000;

/// Slot, old and new address.
type Move = (u8, Option<u64>, Option<u64>);

/// Keeps what it was told, and refuses addresses below 4 GiB.
#[derive(Default)]
struct Mapper {
    moves: Mutex<Vec<Move>>,
    function: Mutex<Option<Weak<Mutex<dyn PciFunction>>>>,
}

impl BarMapper for Mapper {
    fn moved(&self, slot: u8, old: Option<u64>, new: Option<u64>) -> io::Result<()> {
        if let Some(function) = self.function.lock().unwrap().as_ref().and_then(Weak::upgrade) {
            assert!(function.try_lock().is_ok(), "the function is locked");
        }
        self.moves.lock().unwrap().push((slot, old, new));
        match new {
            Some(0..0x1_0000_0000) => Err(io::ErrorKind::AddrInUse.into()),
            _ => Ok(()),
        }
    }
}

impl Mapper {
    fn take(&self) -> Vec<Move> {
        std::mem::take(&mut self.moves.lock().unwrap())
    }
}

struct Plain(ConfigSpace);

impl PciFunction for Plain {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn bar(&self) -> Option<u64> {
        self.0.bar()
    }
}

fn function() -> SharedFunction {
    let mut config = ConfigSpace::new(&HOST_BRIDGE);
    config.add_bar(0x1000, BAR);
    Arc::new(Mutex::new(Plain(config)))
}

/// A bus with a function in slot 1.
fn segment() -> (Arc<Mapper>, Arc<PciSegment>, Ecam) {
    let mapper = Arc::<Mapper>::default();
    let segment = Arc::new(PciSegment::new(Arc::clone(&mapper) as Arc<dyn BarMapper>));
    let function = function();
    *mapper.function.lock().unwrap() = Some(Arc::downgrade(&function));
    segment.attach(1, Arc::clone(&function)).unwrap();
    (mapper, Arc::clone(&segment), Ecam::new(segment))
}

fn ecam_read(ecam: &mut Ecam, slot: u64, function: u64, register: u64) -> u32 {
    let mut data = [0xff; 4];
    ecam.read(slot << 15 | function << 12 | register, &mut data);
    u32::from_le_bytes(data)
}

fn ecam_write(ecam: &mut Ecam, register: u64, value: u32) {
    ecam.write(1 << 15 | register, &value.to_le_bytes());
}

fn memory_on(ecam: &mut Ecam) {
    ecam_write(ecam, 4, command::MEMORY.into());
}

#[test]
fn shows_a_host_bridge_and_all_ones_elsewhere() {
    let (_, _, mut ecam) = segment();
    assert_eq!(ecam_read(&mut ecam, 0, 0, 0), 0x0d57_8086);
    assert_eq!(ecam_read(&mut ecam, 0, 0, 8) >> 16, 0x0600);
    assert_eq!(ecam_read(&mut ecam, 0, 1, 0), u32::MAX);
    assert_eq!(ecam_read(&mut ecam, 2, 0, 0), u32::MAX);
    assert_eq!(ecam_read(&mut ecam, 32, 0, 0), u32::MAX);
}

#[test]
fn reaches_the_same_registers_through_the_ports() {
    let (_, segment, mut ecam) = segment();
    let mut ports = ConfigPorts::new(segment);
    ports.write(0, &0x8000_083cu32.to_le_bytes());
    ports.write(4, &[0x55]);
    ports.write(0, &0x8000_080cu32.to_le_bytes());
    ports.write(4, &[0x10]);
    let mut data = [0xff; 2];
    ports.read(4, &mut data);
    assert_eq!(data, [0x10, 0]);
    assert_eq!(ecam_read(&mut ecam, 1, 0, 0x0c), 0x10);
}

#[test]
fn keeps_the_port_address_only_when_it_is_written_whole() {
    let (_, segment, _) = segment();
    let mut ports = ConfigPorts::new(segment);
    ports.write(3, &[0x01]);
    assert_eq!(ports.address(), 0);
    ports.write(0, &u32::MAX.to_le_bytes());
    let mut data = [0; 4];
    ports.read(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8fff_fffc);
    let mut byte = [0];
    ports.read(2, &mut byte);
    assert_eq!(byte, [0xff]);
}

#[test]
fn answers_the_data_ports_only_when_enabled_and_on_bus_zero() {
    let (_, segment, _) = segment();
    let mut ports = ConfigPorts::new(segment);
    let mut read = |address: u32, port: u64, len: usize| {
        let mut data = vec![0; len];
        ports.set_address(address);
        ports.read(port, &mut data);
        data
    };
    assert_eq!(read(0x8000_0000, 6, 2), [0x57, 0x0d]);
    assert_eq!(read(0x0000_0000, 4, 4), [0xff; 4]);
    assert_eq!(read(0x8001_0000, 4, 4), [0xff; 4]);
    assert_eq!(read(0x8000_0000, 6, 4), [0xff; 4]);
    assert_eq!(read(0x8f00_0000, 4, 4), [0; 4]);
}

#[test]
fn gives_out_the_lowest_free_slot_until_none_is_left() {
    let (_, segment, _) = segment();
    assert_eq!(segment.free_slot(), Some(2));
    for slot in 2..SLOTS {
        segment.attach(slot, function()).unwrap();
    }
    assert_eq!(segment.free_slot(), None);
    segment.detach(7).unwrap();
    assert_eq!(segment.free_slot(), Some(7));
}

#[test]
fn refuses_a_taken_slot_and_one_that_does_not_exist() {
    let (_, segment, _) = segment();
    let refused = |slot| matches!(segment.attach(slot, function()), Err(PciError::Slot { .. }));
    assert!(refused(0) && refused(1) && refused(32));
    assert!(segment.detach(0).is_none() && segment.detach(9).is_none() && segment.detach(255).is_none());
}

#[test]
fn maps_a_bar_while_it_is_decoded() {
    let (mapper, _, mut ecam) = segment();
    memory_on(&mut ecam);
    ecam_write(&mut ecam, 0x0c, 1);
    ecam_write(&mut ecam, 4, 0);
    assert_eq!(mapper.take(), [(1, None, Some(BAR)), (1, Some(BAR), None)]);
}

#[test]
fn moves_a_decoded_bar() {
    let (mapper, _, mut ecam) = segment();
    memory_on(&mut ecam);
    mapper.take();
    ecam_write(&mut ecam, 0x10, 0x10_0000);
    assert_eq!(mapper.take(), [(1, Some(BAR), Some(BAR + 0x10_0000))]);
}

#[test]
fn leaves_a_bar_unmapped_that_the_mapper_refuses() {
    let (mapper, segment, mut ecam) = segment();
    memory_on(&mut ecam);
    ecam_write(&mut ecam, 0x14, 0);
    mapper.take();
    ecam_write(&mut ecam, 4, 0);
    assert!(segment.detach(1).is_some());
    assert_eq!(mapper.take(), []);
}

#[test]
fn maps_a_refused_bar_once_it_moves_to_a_good_address() {
    let (mapper, _, mut ecam) = segment();
    memory_on(&mut ecam);
    ecam_write(&mut ecam, 0x14, 0);
    mapper.take();
    ecam_write(&mut ecam, 0x14, 0x41);
    assert_eq!(mapper.take(), [(1, None, Some(0x41_0000_0000))]);
}

#[test]
fn maps_a_function_that_decodes_already_and_unmaps_it_with_its_function() {
    let (mapper, segment, _) = segment();
    let function = function();
    function.lock().unwrap().write_config(4, &[2]);
    segment.attach(5, function).unwrap();
    assert!(segment.detach(5).is_some());
    assert_eq!(mapper.take(), [(5, None, Some(BAR)), (5, Some(BAR), None)]);
}

#[test]
fn refuses_a_function_that_cannot_be_mapped() {
    let (_, segment, _) = segment();
    let function = function();
    function.lock().unwrap().write_config(0x14, &[0; 4]);
    function.lock().unwrap().write_config(4, &[2]);
    assert!(matches!(
        segment.attach(5, function),
        Err(PciError::Bar {
            slot: 5,
            address: 0,
            ..
        })
    ));
    assert_eq!(segment.free_slot(), Some(2));
    assert!(segment.detach(5).is_none());
}
