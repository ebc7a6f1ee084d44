//! The language of the guest's agent (`resources/guest/agent` describes it): lines of text over the serial console,
//! among which the kernel may write too.

/// What one line of the console means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Line {
    /// The agent has started.
    Ready,
    /// The answer to a script begins: its id and exit code.
    Answer { id: String, code: i32 },
    /// The answer is complete: its id, and the CRC-32 of the lines in between.
    End { id: String, crc: u32 },
    /// The agent did not understand a request.
    Error(String),
    /// Part of an output, or something that the agent did not write.
    Other(String),
}

impl Line {
    pub(crate) fn parse(line: &str) -> Self {
        Self::parse_marker(line).unwrap_or_else(|| Self::Other(line.to_owned()))
    }

    fn parse_marker(line: &str) -> Option<Self> {
        let inner = line.strip_prefix("@@")?.strip_suffix("@@")?;
        let words: Vec<&str> = inner.split(' ').collect();
        match words[..] {
            ["MAYFLY", "READY"] => Some(Self::Ready),
            ["MAYFLY", "ERROR", ..] => Some(Self::Error(words[2..].join(" "))),
            ["MAYFLY", id, code] => Some(Self::Answer {
                id: id.into(),
                code: code.parse().ok()?,
            }),
            ["END", id, crc] => Some(Self::End {
                id: id.into(),
                crc: u32::from_str_radix(crc, 16).ok()?,
            }),
            _ => None,
        }
    }
}

/// Collects one answer out of the lines of the console.
#[derive(Debug)]
pub(crate) struct Collector {
    id: String,
    code: Option<i32>,
    lines: Vec<String>,
}

/// What a line did to an answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// More is to come.
    Pending,
    /// It is here: exit code and output.
    Complete(i32, Vec<u8>),
    /// Something broke into it: ask for it again.
    Damaged,
    /// It will never come.
    Failed(String),
}

impl Collector {
    pub(crate) fn new(id: &str) -> Self {
        Self {
            id: id.into(),
            code: None,
            lines: Vec::new(),
        }
    }

    /// True when the beginning of the answer was seen.
    pub(crate) fn has_begun(&self) -> bool {
        self.code.is_some()
    }

    pub(crate) fn take(&mut self, line: Line) -> Progress {
        match line {
            Line::Answer { id, code } if id == self.id => {
                self.code = Some(code);
                self.lines.clear();
            }
            Line::Other(text) if self.code.is_some() && is_base64(&text) => self.lines.push(text),
            Line::End { id, crc } if id == self.id => return self.finish(crc),
            Line::Ready => return Progress::Failed("the agent was restarted".into()),
            Line::Error(what) => return Progress::Failed(format!("the agent says: {what}")),
            _ => {}
        }
        Progress::Pending
    }

    fn finish(&mut self, crc: u32) -> Progress {
        let encoded: String = self.lines.iter().flat_map(|line| [line, "\n"]).collect();
        match (self.code.take(), decode_base64(&encoded)) {
            (Some(code), Some(output)) if crc32(encoded.as_bytes()) == crc => {
                Progress::Complete(code, output)
            }
            _ => Progress::Damaged,
        }
    }
}

/// The line that makes the agent run a script.
pub(crate) fn run_line(id: &str, script: &str) -> String {
    format!("RUN {id} {}\n", encode_base64(script.as_bytes()))
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn is_base64(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte == b'=' || ALPHABET.contains(&byte))
}

fn encode_base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk
            .iter()
            .fold(0u32, |group, byte| group << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let index = (group >> (18 - 6 * digit)) & 63;
            text.push(if digit <= chunk.len() {
                char::from(ALPHABET[index as usize])
            } else {
                '='
            });
        }
    }
    text
}

/// Decodes base64, ignoring line breaks; `None` when it is none.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut group, mut bits) = (Vec::new(), 0u32, 0u32);
    for digit in text.bytes().filter(|byte| !matches!(byte, b'\n' | b'=')) {
        let value = ALPHABET.iter().position(|known| *known == digit)?;
        group = group << 6 | u32::try_from(value).ok()?;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(group >> bits & 0xff).ok()?);
            group &= (1 << bits) - 1;
        }
    }
    Some(bytes)
}

/// CRC-32 as IEEE 802.3 has it, bit by bit: the outputs are small.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| {
        if crc & 1 == 1 {
            crc >> 1 ^ 0xedb8_8320
        } else {
            crc >> 1
        }
    };
    !bytes
        .iter()
        .fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_all(collector: &mut Collector, lines: &[&str]) -> Vec<Progress> {
        lines
            .iter()
            .map(|line| collector.take(Line::parse(line)))
            .collect()
    }

    /// The answer 7 with exit code 0 and the output "hello\n"; between its lines is room for more.
    const BEGIN: &str = "@@MAYFLY 7 0@@";
    const OUTPUT: &str = "aGVsbG8K";
    const END: &str = "@@END 7 7feb660e@@";

    #[test]
    fn base64_is_what_the_standard_says() {
        let encoded = ["", "f", "fo", "foo", "foob"].map(|text| encode_base64(text.as_bytes()));
        assert_eq!(encoded, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]);
        assert_eq!(decode_base64("Zm9v\nYg==\n"), Some(b"foob".to_vec()));
        assert_eq!(decode_base64("Zm9v!"), None);
    }

    #[test]
    fn base64_keeps_every_byte() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(decode_base64(&encode_base64(&bytes)), Some(bytes));
    }

    #[test]
    fn crc_has_the_standard_check_value() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn takes_a_whole_answer() {
        let mut collector = Collector::new("7");
        let progress = take_all(&mut collector, &[BEGIN, OUTPUT, END]);
        assert_eq!(progress.last(), Some(&Progress::Complete(0, b"hello\n".to_vec())));
    }

    #[test]
    fn an_answer_without_output_has_the_crc_zero() {
        let mut collector = Collector::new("7");
        let progress = take_all(&mut collector, &["@@MAYFLY 7 3@@", "@@END 7 00000000@@"]);
        assert_eq!(progress.last(), Some(&Progress::Complete(3, Vec::new())));
    }

    #[test]
    fn messages_between_the_lines_do_no_harm() {
        let mut collector = Collector::new("7");
        let noise = "[    1.0] some: kernel message";
        let progress = take_all(&mut collector, &[noise, BEGIN, noise, OUTPUT, "", END]);
        assert_eq!(progress.last(), Some(&Progress::Complete(0, b"hello\n".to_vec())));
    }

    #[test]
    fn a_message_within_a_line_damages_the_answer() {
        let mut collector = Collector::new("7");
        let broken = "aGVs[    1.0] kernel";
        let progress = take_all(&mut collector, &[BEGIN, broken, END]);
        assert_eq!(progress.last(), Some(&Progress::Damaged));
    }

    #[test]
    fn an_end_without_a_beginning_damages_the_answer() {
        let mut collector = Collector::new("7");
        assert_eq!(
            take_all(&mut collector, &["@@END 7 00000000@@"]),
            [Progress::Damaged]
        );
    }

    #[test]
    fn other_answers_are_not_taken() {
        let mut collector = Collector::new("8");
        let progress = take_all(&mut collector, &[BEGIN, OUTPUT, END]);
        assert!(
            progress.iter().all(|progress| *progress == Progress::Pending),
            "{progress:?}"
        );
    }

    #[test]
    fn a_restarted_or_confused_agent_ends_the_wait() {
        let progress = take_all(
            &mut Collector::new("7"),
            &["@@MAYFLY READY@@", "@@MAYFLY ERROR bad line@@"],
        );
        assert!(
            progress
                .iter()
                .all(|progress| matches!(progress, Progress::Failed(_))),
            "{progress:?}"
        );
    }

    #[test]
    fn a_request_is_one_line() {
        assert_eq!(run_line("1", "echo a\necho b"), "RUN 1 ZWNobyBhCmVjaG8gYg==\n");
    }
}
