//! The entropy device (virtio 1.2 §5.4): fills the guest's buffers with random bytes of the host.
//!
//! The smallest device, and so the one to read first: config, counters, state and behaviour in one file. All calls
//! but [`Config::build`] come from the io thread that owns the device.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Blob, Buffers, Chain, DeviceError, DeviceInfo, DeviceKind, Io, QueueError, StateError, Throttle,
    UpdateError, Vector, VirtioDevice, feature,
};
use crate::rate_limiter::{self, RateLimiterConfig, serialize_effective};

const KIND: &str = "entropy";
const QUEUE_SIZE: u16 = 256;
/// The most bytes that one request gets, so that no request can hold the io thread for long.
const MAX_BYTES: usize = 64 << 10;
/// The most requests served before other devices have their turn.
const TURN: usize = 16;
/// Bytes asked of the host at a time.
const PORTION: usize = 4096;
/// The device's only descriptor: the timer of its rate limiter.
const LIMITER_TOKEN: u32 = 0;

/// What the user asks: the API body, the config file's section and the answer to `GET`, in one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct EntropyDeviceConfig")]
pub struct Config {
    /// Limits the bytes given to the guest, and its requests.
    #[serde(serialize_with = "serialize_effective")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

impl Config {
    /// Makes the device.
    pub fn build(&self) -> Rng {
        Rng {
            info: DeviceInfo {
                kind: DeviceKind::Entropy,
                queue_sizes: vec![QUEUE_SIZE],
                features: feature::COMMON,
            },
            throttle: Throttle::new(self.rate_limiter.as_ref(), LIMITER_TOKEN),
            metrics: Metrics::default(),
        }
    }
}

/// Counters since creation, named as Firecracker names them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Activations that failed.
    pub activate_fails: u64,
    /// Requests that were not served, and events that ended in a broken queue.
    pub entropy_event_fails: u64,
    /// Requests.
    pub entropy_event_count: u64,
    /// Random bytes given.
    pub entropy_bytes: u64,
    /// Times that the host had no random bytes.
    pub host_rng_fails: u64,
    /// Requests that the rate limiter held back.
    pub entropy_rate_limiter_throttled: u64,
    /// Events of the rate limiter.
    pub rate_limiter_event_count: u64,
}

/// What a snapshot keeps. No request outlives a call.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    rate_limiter: rate_limiter::State,
}

/// The entropy device.
pub struct Rng {
    info: DeviceInfo,
    throttle: Throttle,
    metrics: Metrics,
}

impl Rng {
    /// Answers one request with as many bytes as wanted; returns how many were written to it.
    fn serve(&mut self, buffers: &Buffers<'_>, wanted: usize) -> usize {
        self.metrics.entropy_event_count += 1;
        let mut random = [0; PORTION];
        let mut done = 0;
        while done < wanted {
            let portion = &mut random[..PORTION.min(wanted - done)];
            if let Err(error) = crate::random::fill(portion) {
                self.metrics.host_rng_fails += 1;
                log::warn!("entropy: the host gave no random bytes: {error}");
                break;
            }
            done += buffers.write(done, portion);
        }
        self.metrics.entropy_bytes += done as u64;
        // An empty answer tells the driver that it asked for nothing, or that the host failed.
        self.metrics.entropy_event_fails += u64::from(done == 0);
        done
    }

    /// Answers what the driver has asked, at most one turn of it, and interrupts it once.
    fn serve_turn(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        let mut chain = Chain::new();
        let mut ring = io.queues[0].open(io.mem)?;
        ring.disable_notify();
        self.throttle.begin(io.clock);
        io.again = Some(0);
        for _ in 0..TURN {
            if ring.pop(&mut chain)? {
                let wanted = chain.writable.len().min(MAX_BYTES);
                if !self.throttle.take(wanted) {
                    self.metrics.entropy_rate_limiter_throttled += 1;
                    ring.unpop(1);
                    io.again = None;
                    break;
                }
                let written = self.serve(&chain.writable, wanted);
                ring.push(chain.head(), u32::try_from(written).expect("at most MAX_BYTES"));
            } else if !ring.enable_notify()? {
                io.again = None;
                break;
            }
        }
        ring.publish();
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(0));
        }
        Ok(())
    }
}

impl VirtioDevice for Rng {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn config_space(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.throttle.activate(io);
        self.metrics.activate_fails += u64::from(result.is_err());
        result
    }

    fn on_queue(&mut self, _queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if self.throttle.is_holding() {
            return Ok(());
        }
        let result = self.serve_turn(io);
        self.metrics.entropy_event_fails += u64::from(result.is_err());
        result?;
        self.throttle.settle(io.clock)
    }

    fn on_event(&mut self, _token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if !self.throttle.release() {
            return Ok(());
        }
        self.metrics.rate_limiter_event_count += 1;
        self.on_queue(0, io)
    }

    fn reset(&mut self) {
        self.throttle.reset();
    }

    fn update(&mut self, _patch: Value, _io: &mut Io<'_>) -> Result<(), UpdateError> {
        Err(UpdateError::Refused("the entropy device takes no changes".into()))
    }

    fn save(&self) -> Blob {
        let rate_limiter = self.throttle.save();
        Blob::new(KIND, 1, &State { rate_limiter })
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        let State { rate_limiter } = state.open(KIND, 1)?;
        self.throttle.load(KIND, rate_limiter)
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.metrics).expect("counters are plain data")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Driver, io, memory, readable, recorder, writable};
    use std::time::Duration;
    use vm_memory::{Bytes, GuestAddress};

    fn rng() -> Rng {
        Config::default().build()
    }

    #[test]
    fn fills_all_pieces_of_a_request_and_interrupts_once_a_batch() {
        let (mem, recorder) = (memory(1 << 20), recorder());
        let mut driver = Driver::new(&mem, 0x1000, 8);
        let mut queues = [driver.queue(false)];
        let first = driver.offer(&[writable(0x8000, 40), writable(0x9000, 24)]);
        let second = driver.offer(&[writable(0xa000, 64)]);

        let mut rng = rng();
        rng.on_queue(0, &mut io(&mem, &mut queues, &recorder, 0)).unwrap();

        assert_eq!(
            (driver.used(), driver.used()),
            (Some((first, 64)), Some((second, 64)))
        );
        assert_eq!(recorder.take_interrupts(), 1);
        let (mut one, mut two) = ([0; 24], [0; 24]);
        mem.read_slice(&mut one, GuestAddress(0x9000)).unwrap();
        mem.read_slice(&mut two, GuestAddress(0xa000)).unwrap();
        assert!(one != [0; 24] && one != two);
        assert_eq!(rng.metrics.entropy_bytes, 128);
    }

    #[test]
    fn answers_a_request_without_room_with_zero_bytes() {
        let (mem, recorder) = (memory(1 << 20), recorder());
        let mut driver = Driver::new(&mem, 0x1000, 8);
        let mut queues = [driver.queue(false)];
        let head = driver.offer(&[readable(0x8000, 40)]);
        let mut rng = rng();
        rng.on_queue(0, &mut io(&mem, &mut queues, &recorder, 0)).unwrap();
        assert_eq!(driver.used(), Some((head, 0)));
        assert_eq!(rng.metrics.entropy_event_fails, 1);
    }

    #[test]
    fn caps_a_request_at_64_kib() {
        let (mem, recorder) = (memory(1 << 20), recorder());
        let mut driver = Driver::new(&mem, 0x1000, 8);
        let mut queues = [driver.queue(false)];
        let head = driver.offer(&[writable(0x10000, 0x20000)]);
        rng()
            .on_queue(0, &mut io(&mem, &mut queues, &recorder, 0))
            .unwrap();
        assert_eq!(driver.used(), Some((head, 0x10000)));
        let behind: u64 = mem.read_obj(GuestAddress(0x20000)).unwrap();
        assert_eq!(behind, 0);
    }

    #[test]
    fn leaves_what_is_beyond_a_turn_for_later() {
        let (mem, recorder) = (memory(1 << 20), recorder());
        let mut driver = Driver::new(&mem, 0x1000, 32);
        let mut queues = [driver.queue(false)];
        for _ in 0..TURN + 1 {
            driver.offer(&[writable(0x8000, 8)]);
        }
        let mut rng = rng();
        let mut io = io(&mem, &mut queues, &recorder, 0);
        rng.on_queue(0, &mut io).unwrap();
        assert_eq!((io.again, rng.metrics.entropy_event_count), (Some(0), 16));
        rng.on_queue(0, &mut io).unwrap();
        assert_eq!((io.again, rng.metrics.entropy_event_count), (None, 17));
    }

    #[test]
    fn reports_a_broken_queue() {
        let (mem, recorder) = (memory(1 << 20), recorder());
        let mut driver = Driver::new(&mem, 0x1000, 8);
        let mut queues = [driver.queue(false)];
        driver.offer(&[writable(0xffff_0000, 64)]);
        let mut rng = rng();
        assert!(rng.on_queue(0, &mut io(&mem, &mut queues, &recorder, 0)).is_err());
        assert_eq!(rng.metrics()["entropy_event_fails"], 1);
    }

    #[test]
    fn prints_its_config_and_refuses_unknown_fields() {
        assert!(serde_json::from_str::<Config>(r#"{"x":1}"#).is_err());
        assert_eq!(
            serde_json::to_string(&Config::default()).unwrap(),
            r#"{"rate_limiter":null}"#
        );
    }

    fn limited(limits: &str) -> Rng {
        let config = format!(r#"{{"rate_limiter":{limits}}}"#);
        serde_json::from_str::<Config>(&config).unwrap().build()
    }

    #[test]
    fn holds_back_what_is_beyond_the_bandwidth_until_its_time() {
        let (mem, recorder) = (memory(1 << 20), recorder());
        let mut driver = Driver::new(&mem, 0x1000, 8);
        let mut queues = [driver.queue(false)];
        let heads = [64, 64, 64].map(|len| driver.offer(&[writable(0x8000, len)]));
        let mut rng = limited(r#"{"bandwidth":{"size":100,"refill_time":1000}}"#);
        let mut io = io(&mem, &mut queues, &recorder, 0);

        rng.activate(&mut io).unwrap();
        rng.on_queue(0, &mut io).unwrap();
        assert_eq!((driver.used(), driver.used()), (Some((heads[0], 64)), None));
        recorder.pass(Duration::from_millis(279));
        rng.on_event(LIMITER_TOKEN, &mut io).unwrap();
        assert_eq!(driver.used(), None);
        recorder.pass(Duration::from_millis(1));
        rng.on_event(LIMITER_TOKEN, &mut io).unwrap();
        assert_eq!((driver.used(), driver.used()), (Some((heads[1], 64)), None));
        let Metrics {
            entropy_rate_limiter_throttled,
            rate_limiter_event_count,
            ..
        } = rng.metrics;
        assert_eq!((entropy_rate_limiter_throttled, rate_limiter_event_count), (3, 2));
        assert_eq!(rng.metrics.entropy_event_fails, 0);
    }

    #[test]
    fn limits_requests_that_want_nothing_too() {
        let (mem, recorder) = (memory(1 << 20), recorder());
        let mut driver = Driver::new(&mem, 0x1000, 8);
        let mut queues = [driver.queue(false)];
        for _ in 0..3 {
            driver.offer(&[readable(0x8000, 8)]);
        }
        let mut rng = limited(r#"{"ops":{"size":2,"refill_time":1000}}"#);
        let mut io = io(&mem, &mut queues, &recorder, 0);
        rng.activate(&mut io).unwrap();
        rng.on_queue(0, &mut io).unwrap();
        assert_eq!((rng.metrics.entropy_event_count, io.again), (2, None));
    }

    #[test]
    fn loads_what_it_saved() {
        assert!(rng().load(rng().save()).is_ok());
        assert!(rng().load(Blob::new("net", 1, &[0; 0])).is_err());
        assert!(
            rng()
                .load(limited(r#"{"ops":{"size":2,"refill_time":1}}"#).save())
                .is_err()
        );
    }
}
