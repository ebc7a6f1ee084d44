//! A subscriber of `GET /events`.

use serde_json::Value;

use crate::{Client, Failure, Result};

/// The events of a monitor, one after another.
#[derive(Debug)]
pub struct EventStream(Client);

impl EventStream {
    /// Subscribes over a connection of its own; the state at the beginning is the first event.
    pub fn open(mut client: Client) -> Result<Self> {
        let head = client.request("GET", "/events", "")?.success()?;
        match head.header("content-type") {
            Some("application/x-ndjson") => Ok(Self(client)),
            other => Err(Failure::new(format!("the stream is {other:?}"))),
        }
    }

    /// The next event, without its time; `None` after the last one.
    pub fn next_event(&mut self) -> Result<Option<Value>> {
        let Some(line) = self.0.line()? else {
            return Ok(None);
        };
        let mut event: Value = serde_json::from_str(&line)?;
        let time = event
            .as_object_mut()
            .and_then(|event| event.remove("timestamp_us"));
        match time.and_then(|time| time.as_u64()) {
            Some(1_700_000_000_000_000..) => Ok(Some(event)),
            _ => Err(Failure::new(format!("no time in {line}"))),
        }
    }

    /// Takes events up to one of this name.
    pub fn wait_for(&mut self, name: &str) -> Result<Value> {
        while let Some(event) = self.next_event()? {
            if event["event"] == name {
                return Ok(event);
            }
        }
        Err(Failure::new(format!("the stream ended without {name:?}")))
    }

    /// All events up to the end of the stream.
    pub fn rest(&mut self) -> Result<Vec<Value>> {
        std::iter::from_fn(|| self.next_event().transpose()).collect()
    }
}
