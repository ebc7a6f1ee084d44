//! A small HTTP/1.1 client over a unix socket: enough to use the API, and raw enough to misuse it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::{Failure, Result};

/// How long the API may take to answer.
const TIMEOUT: Duration = Duration::from_secs(60);

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Status line and headers, with the empty line that ends them.
    pub head: String,
    /// The body; empty when there is none.
    pub body: String,
}

impl Response {
    /// The value of a header, by its name in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().skip(1);
        let found = lines.find_map(|line| {
            line.split_once(':')
                .filter(|(key, _)| key.eq_ignore_ascii_case(name))
        });
        found.map(|(_, value)| value.trim())
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).map_err(|e| Failure::new(format!("{e} in the body {:?}", self.body)))
    }

    /// The reason of a refusal; fails when it is none.
    pub fn fault(&self) -> Result<String> {
        let text = self.json()?["fault_message"].as_str().map(str::to_owned);
        text.filter(|_| self.status >= 400)
            .ok_or_else(|| Failure::new(format!("not a refusal: {self:?}")))
    }

    /// Panics unless this is a 400 whose reason has all these words.
    #[track_caller]
    pub fn assert_refused(&self, words: &[&str]) {
        assert_eq!(self.status, 400, "{self:?}");
        let fault = self.fault().unwrap_or_default();
        assert!(
            words.iter().all(|word| fault.contains(word)),
            "{words:?} are not all in {fault:?}"
        );
    }

    /// The answer itself when the request was carried out, else a failure that shows it.
    pub fn success(self) -> Result<Self> {
        if matches!(self.status, 200 | 204) {
            return Ok(self);
        }
        Err(Failure::new(format!(
            "the API answered {}: {}",
            self.status, self.body
        )))
    }
}

/// A connection that stays open over many requests.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Bytes that arrived after the last answer taken.
    rest: Vec<u8>,
}

impl Client {
    /// Connects.
    pub fn connect(socket: &Path) -> Result<Self> {
        let failed = |e| Failure::new(format!("cannot connect to {}: {e}", socket.display()));
        let stream = UnixStream::connect(socket).map_err(failed)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self {
            stream,
            rest: Vec::new(),
        })
    }

    /// Sends a request and takes its answer.
    pub fn request(&mut self, method: &str, path: &str, body: &str) -> Result<Response> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
        if !body.is_empty() {
            head.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            ));
        }
        self.send(format!("{head}\r\n{body}").as_bytes())?;
        self.receive()
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Takes the next answer.
    pub fn receive(&mut self) -> Result<Response> {
        let head_end = loop {
            if let Some(at) = self.rest.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            self.fill()?;
        };
        let head = String::from_utf8(self.rest[..head_end].to_vec())?;
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.ok_or_else(|| Failure::new(format!("not an HTTP answer: {head:?}")))?;
        let mut response = Response {
            status,
            head,
            body: String::new(),
        };
        let length: usize = response.header("content-length").unwrap_or("0").parse()?;
        while self.rest.len() < head_end + length {
            self.fill()?;
        }
        response.body = String::from_utf8(self.rest[head_end..head_end + length].to_vec())?;
        self.rest.drain(..head_end + length);
        Ok(response)
    }

    /// Takes the next line of an answer without a length; `None` when the server has closed the connection.
    pub fn line(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8(self.rest.drain(..=end).collect())?;
                return Ok(Some(line));
            }
            if self.read_more()? == 0 {
                return if self.rest.is_empty() {
                    Ok(None)
                } else {
                    Err(self.ended())
                };
            }
        }
    }

    /// True when the server has closed the connection, and nothing is left to take.
    pub fn is_closed(&mut self) -> Result<bool> {
        self.stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let end = match self.stream.read(&mut [0; 1]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        };
        self.stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(end && self.rest.is_empty())
    }

    fn fill(&mut self) -> Result {
        match self.read_more()? {
            0 => Err(self.ended()),
            _ => Ok(()),
        }
    }

    /// How many bytes came; zero when the server has closed the connection.
    fn read_more(&mut self) -> Result<usize> {
        let mut bytes = [0; 4096];
        let count = self
            .stream
            .read(&mut bytes)
            .map_err(|e| Failure::new(format!("no answer of the API: {e}")))?;
        self.rest.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn ended(&self) -> Failure {
        let rest = String::from_utf8_lossy(&self.rest);
        Failure::new(format!("the API closed the connection after {rest:?}"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::Scratch;

    /// A client whose server sends these pieces, a little apart, and closes.
    fn served(pieces: &'static [&'static str]) -> (Client, Scratch) {
        let scratch = Scratch::new("client").unwrap();
        let listener = UnixListener::bind(scratch.join("s")).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for piece in pieces {
                stream.write_all(piece.as_bytes()).unwrap();
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        (Client::connect(&scratch.join("s")).unwrap(), scratch)
    }

    #[test]
    fn joins_an_answer_that_comes_in_pieces() {
        let (mut client, _scratch) = served(&["HTTP/1.1 200 \r\nContent-", "Length: 4\r\n\r\nab", "cd"]);
        let response = client.receive().unwrap();
        assert_eq!((response.status, response.body.as_str()), (200, "abcd"));
    }

    #[test]
    fn keeps_answers_apart_that_come_together() {
        let (mut client, _scratch) =
            served(&["HTTP/1.1 204 \r\n\r\nHTTP/1.1 400 \r\ncontent-length: 1\r\n\r\nx"]);
        assert_eq!(client.receive().unwrap().status, 204);
        assert_eq!(client.receive().unwrap().body, "x");
    }

    #[test]
    fn reports_a_connection_that_ends_early() {
        let (mut client, _scratch) = served(&["HTTP/1.1 200 \r\nContent-Length: 4\r\n\r\nab"]);
        let failure = client.receive().unwrap_err().to_string();
        assert!(failure.contains("closed the connection"), "{failure}");
    }

    #[test]
    fn a_refusal_is_no_success_and_tells_its_reason() {
        let body = r#"{"fault_message":"no"}"#.to_owned();
        let response = Response {
            status: 400,
            head: String::new(),
            body,
        };
        assert_eq!(response.fault().unwrap(), "no");
        assert!(response.success().is_err());
    }
}
