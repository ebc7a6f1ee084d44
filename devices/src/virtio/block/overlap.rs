//! The asynchronous engine: requests of a drive overlap, and their answers come in the order in which they are done.
//!
//! A run of the queue takes what the driver offers, submits it all together, and answers what has landed by then; the
//! others land at events of the ring. What the backend has no place for is carried out where it is taken. A flush needs no
//! order: it is for the writes that the driver has seen answered (virtio 1.2 §5.2.6.2), and those are with the host.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

use super::backend::Backend;
use super::device::{Admitted, Block, ENGINE_TOKEN, RUN_REQUESTS, RUN_TIME};
use super::settle::Changes;
use super::uring::{Flight, Uring};
use super::{Config, IoEngine, OpenError};
use crate::GuestMemory;
use crate::virtio::{DeviceError, Io, QueueError, Ring, UpdateError, Vector};

/// A run ends when it has taken requests for this many bytes: the kernel moves those in its page cache while it takes
/// them, and the guest waits.
const RUN_BYTES: usize = 1 << 20;

/// The engine that a config asks for; none when requests are carried out where they are taken.
pub(super) fn engine(config: &Config, backend: &dyn Backend) -> Result<Option<Box<Uring>>, OpenError> {
    if config.io_engine.unwrap_or_default() == IoEngine::Sync {
        return Ok(None);
    }
    let files = backend.files();
    if files.is_empty() {
        return Ok(None);
    }
    let engine = Uring::new(&files).map_err(|source| OpenError::Engine {
        path: config.path_on_host.clone().unwrap_or_default(),
        source,
    })?;
    Ok(Some(Box::new(engine)))
}

impl Block {
    /// Watches what tells that requests have landed.
    pub(super) fn watch_engine(&self, io: &Io<'_>) -> Result<(), DeviceError> {
        let Some(engine) = &self.engine else { return Ok(()) };
        let watched = io.watch.add(engine.as_raw_fd(), ENGINE_TOKEN);
        watched.map_err(|source| DeviceError::Host {
            op: "watch the requests of a drive",
            source,
        })
    }

    /// A run of the queue, whose requests go on when it is over.
    pub(super) fn run_ahead<'m>(
        &mut self,
        engine: &mut Uring,
        ring: &mut Ring<'_, 'm>,
        mem: &'m GuestMemory,
        write_through: bool,
    ) -> Result<bool, DeviceError> {
        self.land(engine, ring);
        let mut changes = Changes::of_run(&*self.backend);
        let launched = match self.throttle.is_holding() {
            true => Ok(false),
            false => self
                .launch(engine, ring, write_through, &mut changes)
                .map_err(DeviceError::from),
        };
        self.settle_run(&changes);
        let result = launched.and_then(|more| self.start(engine, ring).map(|()| more));
        if result.is_err() {
            // The device is called no more before its reset, and nothing may be going on until then.
            engine.drain();
        }
        engine.keep(mem);
        result
    }

    /// Takes requests from the queue; those that overlap are pushed, others answered.
    fn launch<'m>(
        &mut self,
        engine: &mut Uring,
        ring: &mut Ring<'_, 'm>,
        write_through: bool,
        changes: &mut Changes<'m>,
    ) -> Result<bool, QueueError> {
        let (mut count, mut bytes, mut now) = (0, 0, Instant::now());
        let end = now + RUN_TIME;
        ring.disable_notify();
        loop {
            if count == RUN_REQUESTS || bytes >= RUN_BYTES || now >= end {
                return ring.enable_notify();
            }
            if engine.is_full() {
                // All that an honest driver can have offered, so what comes next comes with a notification.
                self.metrics.io_engine_throttled_events += 1;
                return ring.enable_notify().map(|_| false);
            }
            let mut chain = engine.chain();
            if !ring.pop(&mut chain)? {
                engine.give_back(chain);
                if !ring.enable_notify()? {
                    // What lands also leads here.
                    self.metrics.no_avail_buffer += u64::from(count == 0 && engine.is_empty());
                    return Ok(false);
                }
                continue;
            }
            match self.admit(&mut chain) {
                Admitted::Held => {
                    engine.give_back(chain);
                    ring.unpop(1);
                    return Ok(false);
                }
                Admitted::Answered(written) => {
                    ring.push(chain.head(), written);
                    engine.give_back(chain);
                }
                Admitted::Valid(request, status) => {
                    let place = match self.stands_alone(engine, ring)? {
                        true => None,
                        false => self.backend.place(request, &chain, write_through),
                    };
                    if let Some(place) = place {
                        let len = request.bytes(&chain);
                        bytes += len;
                        // SAFETY: needed to keep the chain beyond this call. The caller keeps the guest's memory.
                        now = unsafe { engine.push(chain, &status, request, len, place, write_through) };
                        count += 1;
                        continue;
                    }
                    let result = self.execute(request, &mut chain, write_through);
                    changes.note(request, status, &result);
                    let start = std::mem::replace(&mut now, Instant::now());
                    let written = self.conclude(request, &status, result, now - start);
                    ring.push(chain.head(), written);
                    engine.give_back(chain);
                }
            }
            count += 1;
        }
    }

    /// Starts what was pushed, and answers what has landed; what the kernel did in part goes on.
    fn start(&mut self, engine: &mut Uring, ring: &mut Ring<'_, '_>) -> Result<(), DeviceError> {
        while engine.has_more() {
            engine.submit(false).map_err(submit_failed)?;
            self.land(engine, ring);
        }
        Ok(())
    }

    /// Answers what has landed.
    fn land(&mut self, engine: &mut Uring, ring: &mut Ring<'_, '_>) {
        let mut now = None;
        while let Some((mut flight, result)) = engine.land() {
            let now = *now.get_or_insert_with(Instant::now);
            let result = result.and_then(|()| self.finish(&mut flight));
            let result = result.map(|()| flight.bytes);
            let time = now.saturating_duration_since(flight.start);
            let written = self.conclude(flight.request, &flight.status, result, time);
            ring.push(flight.chain.head(), written);
            engine.give_back(flight.chain);
        }
    }

    /// Does again what others may have undone.
    fn finish(&self, flight: &mut Flight) -> io::Result<()> {
        let Some(rest) = flight.again() else { return Ok(()) };
        self.execute(rest, &mut flight.chain, flight.write_through)
            .map(drop)
    }

    /// Waits until nothing is in flight, and answers it.
    pub(super) fn land_all(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let Some(mut engine) = self.engine.take_if(|engine| !engine.is_empty()) else {
            return Ok(());
        };
        let result = self.land_in(&mut engine, io);
        // Nothing is left but after an error.
        engine.drain();
        self.engine = Some(engine);
        result
    }

    fn land_in(&mut self, engine: &mut Uring, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let Some(running) = io.queues.get_mut(usize::from(self.queue)) else {
            return Ok(());
        };
        let mut ring = running.open(io.mem)?;
        while !engine.is_empty() {
            engine.submit(true).map_err(submit_failed)?;
            self.land(engine, &mut ring);
        }
        ring.publish();
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(self.queue));
        }
        Ok(())
    }

    /// Makes the engine ready for another backend, with nothing on its way to the old one.
    pub(super) fn prepare_swap(&mut self, backend: &dyn Backend, io: &mut Io<'_>) -> Result<(), UpdateError> {
        self.land_all(io)
            .map_err(|error| UpdateError::Device(error.into()))?;
        let Some(engine) = &mut self.engine else {
            return Ok(());
        };
        engine.set_files(&backend.files()).map_err(|source| {
            // The old image is still the one in use.
            self.refresh_engine(io);
            UpdateError::Host {
                op: "register the new image for io_uring".into(),
                source,
            }
        })
    }

    /// Whether a request has neither a disk to wait for nor others to overlap with. The kernel would hand it to another
    /// thread, which costs more than to carry it out.
    fn stands_alone(&self, engine: &Uring, ring: &Ring<'_, '_>) -> Result<bool, QueueError> {
        Ok(self.backend.in_memory() && engine.is_empty() && ring.pending()? == 0)
    }

    /// Follows a swap that another part of the device has made, with nothing in flight. If it cannot, requests are carried
    /// out where they are taken.
    pub(super) fn refresh_engine(&mut self, io: &Io<'_>) {
        let Some(engine) = &mut self.engine else { return };
        if let Err(error) = engine.set_files(&self.backend.files()) {
            log::warn!("a queue of a drive goes on without io_uring: {error}");
            // Nothing listens to it any more, and it has nothing to say.
            let _ = io.watch.remove(engine.as_raw_fd());
            self.engine = None;
        }
    }
}

fn submit_failed(source: io::Error) -> DeviceError {
    DeviceError::Host {
        op: "submit the requests of a drive",
        source,
    }
}
