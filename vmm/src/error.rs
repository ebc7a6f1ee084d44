//! How errors become text: the one line that a client or a user reads.

use std::error::Error;

/// The message of an error and of all its causes, joined by `: `.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        // Some libraries repeat their cause in their own message.
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the disk")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn joins_causes() {
        let error = Outer(std::io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(
            chain(&error),
            "cannot open the disk: No such file or directory (os error 2)"
        );
    }
}
