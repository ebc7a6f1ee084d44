//! The kernel command line: bounded, of printable characters, with room made for parameters before the `--` after
//! which Linux hands everything to init.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestMemory;
use crate::x86_64::layout;

/// What is used when the configuration gives no command line.
pub const DEFAULT: &str =
    "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// Characters that fit: the NUL takes one byte.
pub const MAX_LENGTH: usize = layout::COMMAND_LINE_MAX - 1;

/// The separator between the kernel's parameters and init's arguments.
const INIT_ARGUMENTS: &str = "--";

/// A command line that no kernel could be given.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// Too many characters.
    #[error(
        "the kernel command line has {length} characters, and at most {MAX_LENGTH} fit: shorten boot_args"
    )]
    TooLong {
        /// Its length with everything that the devices add.
        length: usize,
    },
    /// A character that is not printable ASCII.
    #[error(
        "the kernel command line has the character {character:?} at position {position}: \
         use printable ASCII characters only in boot_args"
    )]
    Character {
        /// The first such character.
        character: char,
        /// How many bytes are before it.
        position: usize,
    },
}

/// A valid kernel command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    kernel: String,
    init: Option<String>,
}

impl CommandLine {
    /// Starts with what the user gave. White space at the ends is dropped, and tabs become spaces.
    pub fn new(text: &str) -> Result<CommandLine, CommandLineError> {
        let text = text.replace('\t', " ");
        check_characters(&text)?;
        check_length(text.len())?;
        let (kernel, init) = split_init_arguments(text.trim());
        Ok(CommandLine {
            kernel: kernel.trim_end().to_owned(),
            init: init.map(str::to_owned),
        })
    }

    /// Adds a parameter after the others, before the arguments of init.
    pub fn push(&mut self, parameter: &str) -> Result<(), CommandLineError> {
        check_characters(parameter)?;
        let separator = usize::from(!self.kernel.is_empty());
        check_length(self.as_string().len() + separator + parameter.len())?;
        if separator == 1 {
            self.kernel.push(' ');
        }
        self.kernel.push_str(parameter);
        Ok(())
    }

    /// Whether the kernel's part has a parameter of this name, with or without a value.
    pub fn contains(&self, name: &str) -> bool {
        self.kernel
            .split(' ')
            .any(|parameter| parameter.split('=').next() == Some(name))
    }

    /// Whether the kernel's part gives this value to a parameter, alone or in a list with commas.
    pub fn has_value(&self, name: &str, value: &str) -> bool {
        let mut given = self
            .kernel
            .split(' ')
            .filter_map(|parameter| parameter.split_once('='));
        given.any(|(key, values)| key == name && values.split(',').any(|given| given == value))
    }

    /// The whole line.
    pub fn as_string(&self) -> String {
        match &self.init {
            None => self.kernel.clone(),
            Some(init) if self.kernel.is_empty() => format!("{INIT_ARGUMENTS} {init}"),
            Some(init) => format!("{} {INIT_ARGUMENTS} {init}", self.kernel),
        }
    }

    /// Writes the line with its NUL to [`layout::COMMAND_LINE`].
    pub(super) fn write(&self, memory: &GuestMemory) -> Result<(), GuestMemoryError> {
        let mut bytes = self.as_string().into_bytes();
        bytes.push(0);
        memory.write_slice(&bytes, GuestAddress(layout::COMMAND_LINE))
    }
}

fn check_length(length: usize) -> Result<(), CommandLineError> {
    if length > MAX_LENGTH {
        Err(CommandLineError::TooLong { length })
    } else {
        Ok(())
    }
}

fn check_characters(text: &str) -> Result<(), CommandLineError> {
    match text
        .char_indices()
        .find(|(_, character)| !matches!(character, ' '..='~'))
    {
        Some((position, character)) => Err(CommandLineError::Character { character, position }),
        None => Ok(()),
    }
}

/// Splits at the first parameter `--` that is not inside double quotes.
fn split_init_arguments(text: &str) -> (&str, Option<&str>) {
    let mut quoted = false;
    let mut start = 0;
    for word in text.split_inclusive(' ') {
        if !quoted && word.trim_end() == INIT_ARGUMENTS {
            return (&text[..start], Some(text[start + word.len()..].trim_start()));
        }
        quoted ^= word.matches('"').count() % 2 == 1;
        start += word.len();
    }
    (text, None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory;

    fn with(text: &str, parameter: &str) -> String {
        let mut line = CommandLine::new(text).unwrap();
        line.push(parameter).unwrap();
        line.as_string()
    }

    #[test]
    fn parameters_are_added_at_the_end() {
        assert_eq!(
            with("console=ttyS0 panic=1", "root=/dev/vda"),
            "console=ttyS0 panic=1 root=/dev/vda"
        );
    }

    #[test]
    fn the_first_parameter_has_no_space_before_it() {
        assert_eq!(with("", "ro"), "ro");
    }

    #[test]
    fn parameters_are_added_before_the_arguments_of_init() {
        assert_eq!(
            with("quiet -- /bin/sh -c true", "ro"),
            "quiet ro -- /bin/sh -c true"
        );
        assert_eq!(with("-- single", "ro"), "ro -- single");
        assert_eq!(with("quiet --", "ro"), "quiet ro -- ");
    }

    #[test]
    fn two_dashes_in_a_word_or_in_quotes_are_no_separator() {
        assert_eq!(with("a=x--y --b", "ro"), "a=x--y --b ro");
        assert_eq!(with("a=\"x -- y\" b", "ro"), "a=\"x -- y\" b ro");
    }

    #[test]
    fn takes_2047_characters_and_no_more() {
        assert!(CommandLine::new(&"x".repeat(2047)).is_ok());
        assert_eq!(
            CommandLine::new(&"x".repeat(2048)),
            Err(CommandLineError::TooLong { length: 2048 })
        );
    }

    #[test]
    fn an_addition_that_does_not_fit_changes_nothing() {
        let mut line = CommandLine::new(&"x".repeat(2040)).unwrap();

        assert_eq!(
            line.push("1234567"),
            Err(CommandLineError::TooLong { length: 2048 })
        );
        assert_eq!(line.push("123456"), Ok(()));
        assert_eq!(line.as_string().len(), 2047);
    }

    #[test]
    fn refuses_control_and_foreign_characters() {
        let newline = CommandLineError::Character {
            character: '\n',
            position: 1,
        };
        assert_eq!(CommandLine::new("a\nb"), Err(newline));
        assert!(CommandLine::new("a\0b").is_err());
        assert!(CommandLine::new("naïve").is_err());
        assert!(CommandLine::new("quiet").unwrap().push("a\u{7f}").is_err());
    }

    #[test]
    fn knows_which_parameters_it_has() {
        let line = CommandLine::new("root=/dev/vda quiet -- console=x").unwrap();

        assert!(line.contains("root") && line.contains("quiet"));
        assert!(!line.contains("console") && !line.contains("roo"));
    }

    #[test]
    fn finds_values_alone_and_in_lists_but_not_after_the_separator() {
        let line = CommandLine::new("pci=nocrs,off quiet a=off -- pci=conf1").unwrap();
        assert!(line.has_value("pci", "off") && line.has_value("a", "off"));
        assert!(
            !line.has_value("pci", "of") && !line.has_value("quiet", "") && !line.has_value("pci", "conf1")
        );
    }

    #[test]
    fn is_written_with_its_nul() {
        let memory = memory::create(1).unwrap();
        memory
            .write_slice(&[0xff; 16], GuestAddress(layout::COMMAND_LINE))
            .unwrap();

        CommandLine::new("quiet").unwrap().write(&memory).unwrap();

        let written: [u8; 7] = memory.read_obj(GuestAddress(layout::COMMAND_LINE)).unwrap();
        assert_eq!(written, *b"quiet\0\xff");
    }

    proptest! {
        #[test]
        fn never_grows_beyond_the_limit(text in "[ -~]{0,2100}", additions in prop::collection::vec("[!-~]{1,300}", 0..8)) {
            if let Ok(mut line) = CommandLine::new(&text) {
                for addition in additions {
                    let _ = line.push(&addition);
                }
                prop_assert!(line.as_string().len() <= MAX_LENGTH);
            }
        }
    }
}
