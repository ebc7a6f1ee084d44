//! The entropy device (virtio 1.2 §5.4): fills the guest's buffers with random bytes of the host.
//!
//! The smallest device, and so the one to read first: config, counters, state and behaviour in one file. All calls
//! but [`Config::build`] come from the io thread that owns the device.

use std::io;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Blob, Buffers, Chain, DeviceError, DeviceInfo, DeviceKind, Io, QueueError, StateError, UpdateError,
    Vector, VirtioDevice, feature,
};
use crate::rate_limiter::{RateLimiterConfig, serialize_effective};

const QUEUE_SIZE: u16 = 256;
/// The most bytes that one request gets, so that no request can hold the io thread for long.
const MAX_BYTES: usize = 64 << 10;
/// The most requests served before other devices have their turn.
const TURN: usize = 16;
/// Bytes asked of the host at a time.
const PORTION: usize = 4096;

/// What the user asks: the API body, the config file's section and the answer to `GET`, in one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Limits the bytes given to the guest.
    #[serde(serialize_with = "serialize_effective")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// Why a config cannot work on any host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Rate limiters do not exist yet.
    #[error("rate limiters of the entropy device are not supported yet: leave rate_limiter out")]
    RateLimiter,
}

impl Config {
    /// Checks all that can be checked without touching the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match self.rate_limiter {
            Some(limits) if limits.is_effective() => Err(ConfigError::RateLimiter),
            _ => Ok(()),
        }
    }

    /// Makes the device.
    pub fn build(&self) -> Result<Rng, ConfigError> {
        self.validate()?;
        Ok(Rng {
            info: DeviceInfo {
                kind: DeviceKind::Entropy,
                queue_sizes: vec![QUEUE_SIZE],
                features: feature::COMMON,
            },
            metrics: Metrics::default(),
        })
    }
}

/// Counters since creation, named as Firecracker names them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Activations that failed; there is nothing in one that could.
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

/// What a snapshot keeps: nothing, as no request outlives a call.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {}

/// The entropy device.
pub struct Rng {
    info: DeviceInfo,
    metrics: Metrics,
}

impl Rng {
    /// Answers one request; returns the bytes written to it.
    fn serve(&mut self, buffers: &Buffers<'_>) -> usize {
        self.metrics.entropy_event_count += 1;
        let wanted = buffers.len().min(MAX_BYTES);
        let mut random = [0; PORTION];
        let mut done = 0;
        while done < wanted {
            let portion = &mut random[..PORTION.min(wanted - done)];
            if let Err(error) = fill_random(portion) {
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
        io.again = Some(0);
        for _ in 0..TURN {
            if ring.pop(&mut chain)? {
                let written = self.serve(&chain.writable);
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

    fn activate(&mut self, _io: &mut Io<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_queue(&mut self, _queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.serve_turn(io);
        self.metrics.entropy_event_fails += u64::from(result.is_err());
        Ok(result?)
    }

    fn update(&mut self, patch: Value, _io: &mut Io<'_>) -> Result<(), UpdateError> {
        // All that could change is the rate limiter.
        let patch: Config = serde_json::from_value(patch)?;
        patch
            .validate()
            .map_err(|error| UpdateError::Device(error.into()))
    }

    fn save(&self) -> Blob {
        Blob::new("entropy", 1, &State {})
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        state.open("entropy", 1).map(|State {}| ())
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.metrics).expect("counters are plain data")
    }
}

/// Fills `out` with random bytes of the kernel.
fn fill_random(out: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < out.len() {
        let rest = &mut out[done..];
        // SAFETY: needed as std has no random source. The kernel writes at most `rest.len()` bytes to `rest`.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Driver, io, memory, readable, recorder, writable};
    use vm_memory::{Bytes, GuestAddress};

    fn rng() -> Rng {
        Config::default().build().unwrap()
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
    fn refuses_a_rate_limiter_that_would_limit() {
        let limited = r#"{"rate_limiter":{"bandwidth":{"size":1,"refill_time":1}}}"#;
        let config: Config = serde_json::from_str(limited).unwrap();
        assert_eq!(config.validate(), Err(ConfigError::RateLimiter));
        assert!(serde_json::from_str::<Config>(r#"{"x":1}"#).is_err());
        assert_eq!(
            serde_json::to_string(&Config::default()).unwrap(),
            r#"{"rate_limiter":null}"#
        );
    }

    #[test]
    fn loads_what_it_saved() {
        assert!(rng().load(rng().save()).is_ok());
        assert!(rng().load(Blob::new("net", 1, &State {})).is_err());
    }
}
