//! A device for the tests of slot and transports: it copies what a chain has to read into what it has to write.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::{
    Blob, Chain, DeviceError, DeviceInfo, DeviceKind, Io, Ring, Sibling, StateError, UpdateError, Vector,
    VirtioDevice, feature,
};

/// Size of both queues.
pub(super) const QUEUE_SIZE: u16 = 8;

/// Where the bytes of the configuration space begin that the driver may write.
const WRITABLE: usize = 4;

/// What a sibling was called for.
pub(super) type Journal = Arc<Mutex<Vec<&'static str>>>;

/// The device.
pub(super) struct Echo {
    info: DeviceInfo,
    config: Vec<u8>,
    served: u64,
    sibling: Option<Box<Echo>>,
    journal: Option<Journal>,
}

impl Echo {
    /// A device with two queues and six bytes of configuration space, of which the driver may write the last two.
    pub(super) fn new() -> Self {
        Self {
            info: DeviceInfo {
                kind: DeviceKind::Block,
                queue_sizes: vec![QUEUE_SIZE; 2],
                features: feature::COMMON | 1 << 5,
            },
            config: b"config".to_vec(),
            served: 0,
            sibling: None,
            journal: None,
        }
    }

    /// Such a device with a sibling for its second queue, which keeps a journal.
    pub(super) fn twins(journal: &Journal) -> Self {
        let sibling = Self {
            journal: Some(Arc::clone(journal)),
            ..Self::new()
        };
        Self {
            sibling: Some(Box::new(sibling)),
            ..Self::new()
        }
    }

    fn note(&self, what: &'static str) {
        if let Some(journal) = &self.journal {
            journal.lock().unwrap().push(what);
        }
    }
}

fn serve(ring: &mut Ring<'_, '_>, served: &mut u64) -> Result<(), DeviceError> {
    let mut chain = Chain::new();
    while ring.pop(&mut chain)? {
        let mut bytes = vec![0; chain.readable.len()];
        chain.readable.read(0, &mut bytes);
        let written = chain.writable.write(0, &bytes);
        ring.push(chain.head(), u32::try_from(written).unwrap());
        *served += 1;
    }
    ring.publish();
    Ok(())
}

impl VirtioDevice for Echo {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn config_space(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset >= WRITABLE {
            self.config[offset..offset + data.len()].copy_from_slice(data);
        }
    }

    fn split(&mut self) -> Vec<Sibling> {
        let sibling = |device: Box<Echo>| Sibling {
            device,
            queues: vec![1],
        };
        self.sibling.take().map(sibling).into_iter().collect()
    }

    fn refresh(&mut self, _: &mut Io<'_>) {
        self.note("refresh");
    }

    fn activate(&mut self, _: &mut Io<'_>) -> Result<(), DeviceError> {
        self.note("activate");
        Ok(())
    }

    fn memory_changed(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        assert_eq!(io.kicks.len(), io.queues.len());
        self.note("memory");
        Ok(())
    }

    fn quiesce(&mut self, _: &mut Io<'_>) -> Result<(), DeviceError> {
        self.note("quiesce");
        Ok(())
    }

    fn reset(&mut self) {
        self.note("reset");
    }

    fn on_queue(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.note(if queue == 0 { "queue 0" } else { "queue 1" });
        let mut ring = io.queues[usize::from(queue)].open(io.mem)?;
        serve(&mut ring, &mut self.served)?;
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(queue));
        }
        Ok(())
    }

    fn update(&mut self, patch: Value, _: &mut Io<'_>) -> Result<(), UpdateError> {
        let config: String = serde_json::from_value(patch)?;
        self.config = config.into_bytes();
        Ok(())
    }

    fn save(&self) -> Blob {
        Blob::new("echo", 1, &(self.served, self.config.clone()))
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        (self.served, self.config) = state.open("echo", 1)?;
        Ok(())
    }

    fn metrics(&self) -> Value {
        json!({ "served": self.served })
    }
}
