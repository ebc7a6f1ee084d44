//! A device and its siblings: in the slot while the driver is not ready, then each in a lane of its own.
//!
//! The lanes may be on different loops. What concerns all of them is sent to all at once, and then waited for, so that a
//! pause takes as long as the slowest sibling and not as all of them.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use serde_json::{Map, Value};
use vm_memory::GuestAddressSpace;

use super::{Half, NoWatch, VirtioSlot};
use crate::counters::add_to_sum;
use crate::timer::HostClock;
use crate::virtio::{
    Histogram, Io, Lane, LaneId, Queue, QueueConfig, QueueError, UpdateError, VirtioDevice, Watch, feature,
};

/// The device, which comes first, and its siblings.
pub(super) type Devices = Vec<Box<dyn VirtioDevice>>;

/// Splits `device`; gives all parts, and for each of its queues which part serves it.
pub(super) fn split(mut device: Box<dyn VirtioDevice>) -> (Devices, Vec<usize>) {
    let mut owners = vec![0; device.info().queue_sizes.len()];
    let siblings = device.split();
    let mut devices = vec![device];
    for sibling in siblings {
        for queue in &sibling.queues {
            owners[usize::from(*queue)] = devices.len();
        }
        devices.push(sibling.device);
    }
    (devices, owners)
}

/// Sums the siblings' counters.
pub(super) fn sum_metrics(mut each: Vec<Value>) -> Value {
    if each.len() == 1 {
        return each.swap_remove(0);
    }
    let mut sum = Map::new();
    each.iter().for_each(|counters| add_to_sum(&mut sum, counters));
    Value::Object(sum)
}

/// Sums the siblings' histograms, which have the same names.
pub(super) fn sum_histograms(
    mut each: Vec<Vec<(&'static str, Histogram)>>,
) -> Vec<(&'static str, Histogram)> {
    let mut sum = each.swap_remove(0);
    for sibling in &each {
        for ((_, total), (_, more)) in sum.iter_mut().zip(sibling) {
            total.add(more);
        }
    }
    sum
}

impl VirtioSlot {
    /// Changes the device where it is: in the slot, or on its loop, with the other loops of its siblings at rest. True
    /// when its configuration space is another one then.
    pub(super) fn change(&mut self, patch: Value) -> Result<bool, UpdateError> {
        let lanes = match &self.half {
            Half::Running(lanes) => lanes.clone(),
            Half::Idle(_) => return self.change_idle(patch),
        };
        let (first, others) = (lanes[0], &lanes[1..]);
        let held = self.on_lanes(others, |lane, watch| lane.pause(watch));
        let result = self.on_lane(first, move |lane, watch| lane.update(patch, watch));
        let changed = result.is_ok();
        for (id, held) in others.iter().zip(held) {
            self.on_lane(*id, move |lane, watch| {
                if changed {
                    lane.refresh(watch);
                }
                if held {
                    lane.resume(watch);
                }
            });
        }
        result
    }

    fn change_idle(&mut self, patch: Value) -> Result<bool, UpdateError> {
        self.with_idle(|devices, io| {
            let (first, others) = devices.split_first_mut().expect("a slot has a device");
            first.update(patch, io)?;
            others.iter_mut().for_each(|sibling| sibling.refresh(io));
            Ok(io.config.set(first.config_space()))
        })
    }

    /// Lets the siblings take over what the first of them has loaded.
    pub(super) fn refresh_idle(&mut self) {
        self.with_idle(|devices, io| devices[1..].iter_mut().for_each(|sibling| sibling.refresh(io)));
    }

    /// Lends the devices that are in the slot what they work with there: no queues and no loop.
    fn with_idle<R>(&mut self, work: impl FnOnce(&mut Devices, &mut Io<'_>) -> R) -> R {
        let Half::Idle(devices) = &mut self.half else {
            unreachable!("the caller has seen that the slot is idle")
        };
        let memory = self.memory.memory();
        let mut io = Io {
            mem: &memory,
            queues: &mut [],
            kicks: &[],
            irq: &*self.irq,
            watch: &NoWatch,
            config: &self.config,
            clock: &HostClock,
            features: self.driver.features,
            again: None,
        };
        work(devices, &mut io)
    }

    /// Moves the devices into lanes. A queue that the driver set up wrongly makes the device need a reset.
    pub(super) fn activate(&mut self, restored: Option<Vec<Queue>>) {
        let memory = self.memory.memory();
        let event_idx = self.driver.features & feature::EVENT_IDX != 0;
        let paused = restored.is_some();
        let make = |config: &QueueConfig| Queue::new(*config, event_idx, &memory);
        let made = || self.driver.queues.iter().map(make).collect();
        let queues: Vec<Queue> = match restored.map_or_else(made, Ok::<_, QueueError>) {
            Ok(queues) => queues,
            Err(error) => {
                return self.health.fail(self.info.kind, &error, &*self.irq);
            }
        };
        let Half::Idle(devices) = &mut self.half else {
            unreachable!("only an idle slot is activated: a reset came before a second DRIVER_OK");
        };
        let devices = std::mem::take(devices);
        let attach = |(index, device)| {
            let own = |(queue, owner): (&Queue, &usize)| match *owner == index {
                true => *queue,
                false => queue.not_ready(),
            };
            let lane = Lane {
                device,
                queues: queues.iter().zip(&self.owners).map(own).collect(),
                kicks: self.kicks.clone(),
                memory: self.memory.clone(),
                irq: Arc::clone(&self.irq),
                config: Arc::clone(&self.config),
                features: self.driver.features,
                health: Arc::clone(&self.health),
                paused,
                tokens: Vec::new(),
            };
            self.host.attach(Box::new(lane))
        };
        self.half = Half::Running(devices.into_iter().enumerate().map(attach).collect());
    }

    /// Takes the devices back from their loops, when they run.
    pub(super) fn deactivate(&mut self) {
        let Half::Running(lanes) = &self.half else { return };
        // All have ended before anything is forgotten.
        self.on_lanes(lanes, |lane, _| lane.end());
        let detach = |id: &LaneId| self.host.detach(*id).into_device();
        let devices: Devices = lanes.iter().map(detach).collect();
        self.config.set(devices[0].config_space());
        self.half = Half::Idle(devices);
    }

    /// Of what each lane has of the queues, what is its own.
    pub(super) fn join_queues(&self, each: &[Vec<Queue>]) -> Vec<Queue> {
        let own = |(index, owner): (usize, &usize)| each[*owner][index];
        self.owners.iter().enumerate().map(own).collect()
    }

    /// Runs `work` on the loop that owns the lane, and waits for its answer.
    pub(super) fn on_lane<R: Send + 'static>(
        &self,
        id: LaneId,
        work: impl FnOnce(&mut Lane, &dyn Watch) -> R + Send + 'static,
    ) -> R {
        answer(&self.send(id, work))
    }

    /// Runs `work` on all these lanes at once, and waits for their answers.
    pub(super) fn on_lanes<R: Send + 'static>(
        &self,
        lanes: &[LaneId],
        work: fn(&mut Lane, &dyn Watch) -> R,
    ) -> Vec<R> {
        let answers: Vec<_> = lanes.iter().map(|id| self.send(*id, work)).collect();
        answers.iter().map(answer).collect()
    }

    fn send<R: Send + 'static>(
        &self,
        id: LaneId,
        work: impl FnOnce(&mut Lane, &dyn Watch) -> R + Send + 'static,
    ) -> Receiver<R> {
        let (answer, result) = mpsc::sync_channel(1);
        let job = move |lane: &mut Lane, watch: &dyn Watch| {
            // The receiver waits.
            let _ = answer.send(work(lane, watch));
        };
        self.host.run(id, Box::new(job));
        result
    }
}

fn answer<R>(result: &Receiver<R>) -> R {
    result.recv().expect("the loop runs every job it takes")
}
