//! Drives with several queues.

use std::sync::Arc;

use serde_json::{Value, json};
use vm_memory::GuestAddressSpace;

use super::*;
use crate::SharedMemory;
use crate::testing::Inline;
use crate::virtio::block::{ConfigError, IoEngine};
use crate::virtio::slot::status;
use crate::virtio::{QueueConfig, VirtioSlot};

const F_MQ: u64 = 1 << 12;
const QUEUES: u16 = 3;

fn many(image: &TempFile, limits: Value) -> Block {
    Config {
        queues: Some(QUEUES),
        rate_limiter: serde_json::from_value(limits).unwrap(),
        ..config(image)
    }
    .build()
    .unwrap()
}

/// A running drive with three queues, and its driver.
struct Machine {
    slot: VirtioSlot,
    host: Arc<Inline>,
    memory: SharedMemory,
}

fn slot(device: Block) -> Machine {
    slot_in(SharedMemory::new(testing::memory(1 << 20)), device)
}

fn slot_in(memory: SharedMemory, device: Block) -> Machine {
    let host = Arc::<Inline>::default();
    let slot = VirtioSlot::new(
        Box::new(device),
        testing::recorder(),
        memory.clone(),
        host.clone(),
    )
    .unwrap();
    Machine { slot, host, memory }
}

fn ring(queue: u16) -> u64 {
    0x1000 * u64::from(queue)
}

fn start(device: Block) -> Machine {
    let mut machine = slot(device);
    let Machine { slot, memory, .. } = &mut machine;
    let features = u32::try_from(feature::INDIRECT_DESC | F_MQ).unwrap();
    for (half, value) in [(0, features), (1, 1)] {
        slot.driver.driver_features_select = half;
        slot.set_driver_features(value);
    }
    let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    slot.set_status(ready);
    for queue in 0..QUEUES {
        slot.driver.queue_select = queue;
        let max_size = slot.queue().unwrap().max_size;
        *slot.queue_mut().unwrap() = QueueConfig {
            max_size,
            ..Driver::new(&memory.memory(), ring(queue), 16).config()
        };
    }
    slot.set_status(ready | status::DRIVER_OK);
    machine
}

/// The drivers of all queues.
fn drivers(mem: &GuestMemory) -> Vec<Driver<'_>> {
    (0..QUEUES)
        .map(|queue| Driver::new(mem, ring(queue), 16))
        .collect()
}

/// Has each queue read a sector of its own; tells which have an answer.
fn read_each(machine: &Machine, mem: &GuestMemory, drivers: &mut [Driver<'_>]) -> Vec<bool> {
    for (queue, driver) in (0u64..).zip(drivers.iter_mut()) {
        let header = HEADER + 0x200 * queue;
        mem.write_slice(&IN.to_le_bytes(), GuestAddress(header)).unwrap();
        mem.write_obj(queue, GuestAddress(header + 8)).unwrap();
        let data = DATA + 0x1000 * queue;
        driver.offer(&[readable(header, 16), writable(data, 512), writable(STATUS, 1)]);
        machine.host.event(u32::try_from(queue).unwrap());
    }
    drivers.iter_mut().map(|driver| driver.used().is_some()).collect()
}

/// The first byte that each queue has read.
fn first_bytes(mem: &GuestMemory) -> [u8; 3] {
    [0, 1, 2].map(|queue| mem.read_obj(GuestAddress(DATA + 0x1000 * queue)).unwrap())
}

fn one_an_hour(ops: u64) -> Value {
    json!({"ops": {"size": ops, "refill_time": 3_600_000}})
}

#[test]
fn offers_as_many_queues_as_the_config_says() {
    let (first, second) = (image(512), image(512));
    let (one, three) = (device(&first), many(&second, Value::Null));
    assert_eq!((one.info().features & F_MQ, one.config_space()[34]), (0, 0));
    assert_eq!(
        (three.info().features & F_MQ, three.config_space()[34]),
        (F_MQ, 3)
    );
    assert_eq!(three.info().queue_sizes, [256; 3]);
}

#[test]
fn shows_the_count_only_when_it_was_set_and_bounds_it() {
    let image = image(512);
    let plain = config(&image);
    assert!(!serde_json::to_string(&plain).unwrap().contains("queues"));
    let with = |queues| Config {
        queues: Some(queues),
        ..plain.clone()
    };
    assert!(
        serde_json::to_string(&with(4))
            .unwrap()
            .ends_with(r#""socket":null,"queues":4}"#)
    );
    assert!(with(1).validate().is_ok() && with(16).validate().is_ok());
    for queues in [0, 17, u16::MAX] {
        let drive_id = "data".to_owned();
        assert_eq!(
            with(queues).validate(),
            Err(ConfigError::Queues { drive_id, queues })
        );
    }
}

#[test]
fn every_queue_reads_the_same_image_and_is_counted() {
    let image = image(3 * 512);
    let machine = start(many(&image, Value::Null));
    let mem = machine.memory.memory();
    let mut drivers = drivers(&mem);
    assert_eq!(machine.host.len(), 3);
    assert_eq!(read_each(&machine, &mem, &mut drivers), [true; 3]);
    assert_eq!(first_bytes(&mem), [1, 2, 3]);
    let metrics = machine.slot.metrics();
    assert_eq!(
        [
            &metrics["read_count"],
            &metrics["read_bytes"],
            &metrics["queue_event_count"]
        ],
        [3, 3 * 512, 3]
    );
    let reads = machine.slot.histograms();
    assert_eq!((reads[0].0, reads[0].1.count()), ("read", 3));
}

#[test]
fn a_driver_may_use_fewer_queues() {
    let image = image(512);
    let mut machine = slot(many(&image, Value::Null));
    let mem = machine.memory.memory();
    let running = start_one_queue(&mut machine);
    let mut driver = Driver::new(&mem, 0, 16);
    read_each(&machine, &mem, std::slice::from_mut(&mut driver));
    assert_eq!(first_bytes(&mem), [1, 0, 0]);
    assert_eq!(machine.slot.status(), running);
}

#[test]
fn queues_that_no_driver_uses_stand_pauses_and_changes() {
    for io_engine in [IoEngine::Sync, IoEngine::Async] {
        let image = image(512);
        let config = Config {
            queues: Some(QUEUES),
            io_engine: Some(io_engine),
            ..config(&image)
        };
        let mut machine = slot(config.build().unwrap());
        let running = start_one_queue(&mut machine);
        machine.slot.pause();
        machine.slot.resume();
        assert_eq!(machine.slot.status(), running, "{io_engine:?}");
        let limits = json!({"drive_id": "data", "rate_limiter": one_an_hour(1)});
        machine.slot.update(limits).unwrap();
        assert_eq!(machine.slot.status(), running, "{io_engine:?}");
    }
}

/// A driver that uses the first queue only; returns the status that it has written.
fn start_one_queue(machine: &mut Machine) -> u8 {
    let (slot, mem) = (&mut machine.slot, machine.memory.memory());
    slot.driver.driver_features_select = 1;
    slot.set_driver_features(1);
    let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    slot.set_status(ready);
    *slot.queue_mut().unwrap() = Driver::new(&mem, 0, 16).config();
    slot.set_status(ready | status::DRIVER_OK);
    ready | status::DRIVER_OK
}

#[test]
fn one_limit_holds_for_all_queues_together() {
    let image = image(3 * 512);
    let machine = start(many(&image, one_an_hour(2)));
    let mem = machine.memory.memory();
    let mut drivers = drivers(&mem);
    assert_eq!(read_each(&machine, &mem, &mut drivers), [true, true, false]);
    assert_eq!(machine.slot.metrics()["rate_limiter_throttled_events"], 1);
}

#[test]
fn a_patch_of_the_limits_reaches_all_queues() {
    let image = image(3 * 512);
    let mut machine = start(many(&image, one_an_hour(1)));
    let mem = machine.memory.memory();
    let mut drivers = drivers(&mem);
    assert_eq!(read_each(&machine, &mem, &mut drivers), [true, false, false]);
    let off = json!({"drive_id": "data", "rate_limiter": {"ops": {"size": 0, "refill_time": 1}}});
    machine.slot.update(off).unwrap();
    assert!(drivers[1].used().is_some() && drivers[2].used().is_some());
    let on = json!({"drive_id": "data", "rate_limiter": one_an_hour(1)});
    machine.slot.update(on).unwrap();
    assert_eq!(read_each(&machine, &mem, &mut drivers), [true, false, false]);
    assert_eq!(machine.slot.metrics()["update_count"], 2);
}

#[test]
fn a_swapped_image_is_that_of_all_queues_and_a_bad_one_of_none() {
    let (old, new) = (image(3 * 512), image(6 * 512));
    let mut machine = start(many(&old, Value::Null));
    let mem = machine.memory.memory();
    let mut drivers = drivers(&mem);
    new.as_file().set_len(0).unwrap();
    let swap = json!({"drive_id": "data", "path_on_host": path(&new)});
    machine.slot.update(swap.clone()).unwrap_err();
    assert_eq!(read_each(&machine, &mem, &mut drivers), [true; 3]);
    assert_eq!(first_bytes(&mem), [1, 2, 3]);

    std::fs::write(new.as_path(), [7; 3 * 512]).unwrap();
    machine.slot.update(swap).unwrap();
    assert_eq!(read_each(&machine, &mem, &mut drivers), [true; 3]);
    assert_eq!(first_bytes(&mem), [7; 3]);
}

#[test]
fn an_image_swapped_before_the_driver_is_ready_is_that_of_all_queues() {
    let (old, new) = (image(512), image(3 * 512));
    let mut device = slot(many(&old, Value::Null));
    let swap = json!({"drive_id": "data", "path_on_host": path(&new)});
    device.slot.update(swap).unwrap();
    let state = device.slot.save();
    drop(device);
    let mut restored = slot(many(&new, Value::Null));
    restored.slot.load(state).unwrap();
    let mut space = [0; 36];
    restored.slot.read_config(0, &mut space);
    assert_eq!((space[0], space[34]), (3, 3));
}

#[test]
fn a_restored_drive_goes_on_with_every_queue_and_no_new_burst() {
    let image = image(3 * 512);
    let machine = start(many(&image, one_an_hour(3)));
    let mem = machine.memory.memory();
    let mut drivers = drivers(&mem);
    assert_eq!(read_each(&machine, &mem, &mut drivers), [true; 3]);
    machine.slot.pause();
    let state = machine.slot.save();

    let memory = machine.memory.clone();
    drop(machine);
    let mut restored = slot_in(memory, many(&image, one_an_hour(3)));
    restored.slot.load(state.clone()).unwrap();
    assert_eq!(restored.slot.save(), state);
    restored.slot.resume();
    assert_eq!(read_each(&restored, &mem, &mut drivers), [false; 3]);
}
