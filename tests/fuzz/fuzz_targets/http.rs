//! A client's byte stream to the HTTP request parser. How the stream is cut into pieces must make no difference to the
//! requests that come out.
//!
//! Input: one byte that chooses the cuts, then the stream.
#![no_main]

use api_server::parser::{Parsed, RequestParser};
use libfuzzer_sys::fuzz_target;

/// Small, so that bodies above it are found.
const MAX_BODY: usize = 256;

fuzz_target!(|input: &[u8]| {
    let Some((&cuts, stream)) = input.split_first() else {
        return;
    };
    let whole = parse(std::iter::once(stream));
    let bytewise = parse(stream.chunks(1));
    let mixed = parse(pieces(stream, cuts).into_iter());
    assert_eq!(whole, bytewise);
    assert_eq!(whole, mixed);
});

/// The requests in a stream, and whether it ends in an error. Interim answers, and which of several faults is reported,
/// depend on what has arrived, so they are left out.
fn parse<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Parsed>, bool) {
    let mut parser = RequestParser::new(MAX_BODY);
    let mut found = Vec::new();
    for piece in pieces {
        parser.feed(piece);
        loop {
            match parser.parse() {
                Parsed::NeedMore => break,
                Parsed::Continue => {}
                error @ Parsed::Error(_) => {
                    assert_eq!(parser.parse(), error, "an error is final");
                    return (found, true);
                }
                request => found.push(request),
            }
        }
    }
    (found, false)
}

/// Cuts a stream into pieces of 1 to 64 bytes.
fn pieces(mut stream: &[u8], cuts: u8) -> Vec<&[u8]> {
    let mut state = u32::from(cuts);
    let mut pieces = Vec::new();
    while !stream.is_empty() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let length = (state >> 26) as usize % stream.len().min(64) + 1;
        let (piece, rest) = stream.split_at(length);
        pieces.push(piece);
        stream = rest;
    }
    pieces
}
