//! Why a test failed, as text for whoever reads its output.

use std::error::Error;
use std::fmt;

/// What tests and the harness return.
pub type Result<T = ()> = std::result::Result<T, Failure>;

/// A failure. It is deliberately no `std::error::Error`, so that every error converts into it; and a test that returns
/// it shows its text with the line breaks as they are.
pub struct Failure(String);

impl Failure {
    /// A failure with this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        Self(text)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_line_breaks_as_they_are() {
        assert_eq!(format!("{:?}", Failure::new("a\nb")), "a\nb");
    }

    #[test]
    fn any_error_becomes_a_failure() {
        let failure = Failure::from("x".parse::<u8>().unwrap_err());
        assert_eq!(failure.to_string(), "invalid digit found in string");
    }
}
