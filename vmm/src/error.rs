//! How errors become text: the one line that a client or a user reads.

use std::error::Error;
use std::io::{self, ErrorKind};

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

/// What a user can do about a file that does not open.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match (error.kind(), error.raw_os_error()) {
        (ErrorKind::NotFound | ErrorKind::NotADirectory, _) => {
            "check the path, and that every folder in it is there"
        }
        (ErrorKind::PermissionDenied, _) => "change the owner or mode of it or of its folders",
        (ErrorKind::ReadOnlyFilesystem, _) => "choose a path where this host can write",
        (ErrorKind::StorageFull | ErrorKind::QuotaExceeded, _) => "make room for it, or choose another path",
        (ErrorKind::InvalidData, _) => "save it as text in UTF-8",
        (_, Some(libc::EMFILE | libc::ENFILE)) => "raise the limit of open files (ulimit -n)",
        _ => "give the path of a regular file",
    }
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

    #[test]
    fn files_that_do_not_open_have_a_remedy_for_the_cause() {
        for (code, part) in [
            (libc::ENOENT, "every folder in it is there"),
            (libc::ENOTDIR, "every folder in it is there"),
            (libc::EACCES, "owner or mode"),
            (libc::EROFS, "where this host can write"),
            (libc::ENOSPC, "make room"),
            (libc::EMFILE, "ulimit -n"),
            (libc::EISDIR, "a regular file"),
            (libc::ENXIO, "a regular file"),
        ] {
            let remedy = remedy(&io::Error::from_raw_os_error(code));
            assert!(remedy.contains(part), "{code}: {remedy}");
        }
    }
}
