//! What the two ends of a test connection do. The host's end runs in the test, the guest's in the program `vsock_peer`;
//! both kinds of sockets read, write and shut down alike.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use crate::{Failure, Result, pattern};

/// Bytes after which the data repeats: a prime, so that data out of place never looks right.
const PERIOD: usize = 1_048_583;
/// Bytes moved at a time.
const PIECE: usize = 256 << 10;

/// Endless data, in which every place can be told.
#[derive(Debug)]
pub struct Data {
    period: Vec<u8>,
    place: usize,
}

impl Default for Data {
    fn default() -> Self {
        let period = pattern(PERIOD);
        Self { period, place: 0 }
    }
}

impl Data {
    /// The next bytes, at most `max` and at least one.
    fn next(&mut self, max: u64) -> &[u8] {
        let max = usize::try_from(max).unwrap_or(PIECE).min(PIECE);
        let start = self.place;
        let end = (start + max).min(PERIOD);
        self.place = end % PERIOD;
        &self.period[start..end]
    }

    /// Whether these are the next bytes.
    fn is_next(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let expected = self.next(bytes.len() as u64);
            let (head, rest) = bytes.split_at(expected.len());
            if head != expected {
                return false;
            }
            bytes = rest;
        }
        true
    }
}

/// Sends this many bytes and closes its direction.
pub fn send(stream: &mut UnixStream, bytes: u64) -> Result {
    let (mut data, mut left) = (Data::default(), bytes);
    while left > 0 {
        let piece = data.next(left);
        stream.write_all(piece)?;
        left -= piece.len() as u64;
    }
    Ok(stream.shutdown(Shutdown::Write)?)
}

/// Receives until the other end closes its direction; these must be as many bytes, in their places.
pub fn take(stream: &mut UnixStream, bytes: u64) -> Result {
    let (mut data, mut total, mut piece) = (Data::default(), 0, vec![0; PIECE]);
    loop {
        let count = stream.read(&mut piece)?;
        if count == 0 {
            break;
        }
        if !data.is_next(&piece[..count]) {
            return Err(Failure::new(format!("wrong data behind byte {total}")));
        }
        total += count as u64;
    }
    if total != bytes {
        return Err(Failure::new(format!("{total} bytes came, not {bytes}")));
    }
    Ok(())
}

/// Sends back what comes, until the other end closes its direction; then closes its own.
pub fn echo(stream: &mut UnixStream) -> Result {
    let mut reader = stream.try_clone()?;
    io::copy(&mut reader, stream)?;
    Ok(stream.shutdown(Shutdown::Write)?)
}

/// Sends a number, and must get it back.
pub fn ping(stream: &mut UnixStream, number: u64) -> Result {
    stream.write_all(&number.to_le_bytes())?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    if u64::from_le_bytes(answer) != number {
        return Err(Failure::new(format!("{answer:?} came back for {number}")));
    }
    Ok(())
}

/// Waits until the connection ends, in whichever way.
pub fn hold(stream: &mut UnixStream) {
    // An error is an end too.
    let _ = io::copy(stream, &mut io::sink());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What one end says of what the other end does.
    fn meet(other: impl FnOnce(&mut UnixStream) -> Result + Send + 'static, bytes: u64) -> Result {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || other(&mut far).map_err(|e| e.to_string()));
        let taken = take(&mut near, bytes);
        thread.join().unwrap().map_err(Failure::new)?;
        taken
    }

    #[test]
    fn takes_what_was_sent() {
        for bytes in [0, 1, PERIOD as u64, 3_000_000] {
            meet(move |far| send(far, bytes), bytes).unwrap();
        }
    }

    #[test]
    fn notices_what_is_missing_or_out_of_place() {
        assert!(meet(|far| send(far, 999), 1000).is_err());
        let swapped =
            |far: &mut UnixStream| Ok(far.write_all(&[&pattern(8192)[4096..], &[0; 4096]].concat())?);
        assert!(meet(swapped, 8192).is_err());
        let twice = |far: &mut UnixStream| Ok(far.write_all(&pattern(4096).repeat(2))?);
        assert!(meet(twice, 8192).is_err());
    }

    #[test]
    fn an_echo_brings_numbers_and_data_back() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || echo(&mut far).is_ok());
        ping(&mut near, 7).unwrap();
        send(&mut near, 100).unwrap();
        take(&mut near, 100).unwrap();
        assert!(thread.join().unwrap());
    }
}
