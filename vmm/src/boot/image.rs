//! A file that is to be booted: opened once, known to be a regular file with something in it, and read by position.
//! It is input from outside: every read is bounded by the size that was seen when it was opened.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use crate::error::remedy;
use crate::memory::GuestMemory;

/// Zeros are looked for in parts of this size.
const ZEROS: usize = 64 << 10;

/// What an image is for, as messages name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

impl fmt::Display for ImageKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            ImageKind::Kernel => "kernel image",
            ImageKind::Initrd => "initrd",
        })
    }
}

/// A boot image cannot be used as a file.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It does not open.
    #[error("cannot open the {kind} {path}: {}", remedy(source))]
    Open {
        /// What it is for.
        kind: ImageKind,
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is a directory, a pipe, a device...
    #[error("the {kind} {path} is {found}: give the path of a regular file")]
    NotAFile {
        /// What it is for.
        kind: ImageKind,
        /// Its path.
        path: PathBuf,
        /// What is there instead.
        found: &'static str,
    },
    /// It has no bytes.
    #[error("the {kind} {path} is empty: copy or build it again")]
    Empty {
        /// What it is for.
        kind: ImageKind,
        /// Its path.
        path: PathBuf,
    },
    /// It ends before what is to be read does.
    #[error("the {kind} {path} is cut short: it has {size} bytes, and {end} are needed for its {part}")]
    Truncated {
        /// What it is for.
        kind: ImageKind,
        /// Its path.
        path: PathBuf,
        /// Bytes in the file.
        size: u64,
        /// Bytes that there should be at least.
        end: u64,
        /// What was being read.
        part: &'static str,
    },
    /// Reading fails.
    #[error("cannot read the {part} of the {kind} {path}")]
    Read {
        /// What it is for.
        kind: ImageKind,
        /// Its path.
        path: PathBuf,
        /// What was being read.
        part: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An open boot image.
#[derive(Debug)]
pub struct Image {
    kind: ImageKind,
    path: PathBuf,
    file: File,
    size: u64,
}

impl Image {
    /// Opens the file at `path` for reading.
    pub fn open(kind: ImageKind, path: &Path) -> Result<Image, ImageError> {
        let open_error = |source| ImageError::Open {
            kind,
            path: path.to_owned(),
            source,
        };
        let file = open_without_blocking(path).map_err(open_error)?;
        let metadata = file.metadata().map_err(open_error)?;
        if !metadata.is_file() {
            let found = if metadata.is_dir() {
                "a directory"
            } else {
                "not a regular file"
            };
            return Err(ImageError::NotAFile {
                kind,
                path: path.to_owned(),
                found,
            });
        }
        if metadata.len() == 0 {
            return Err(ImageError::Empty {
                kind,
                path: path.to_owned(),
            });
        }
        Ok(Image {
            kind,
            path: path.to_owned(),
            file,
            size: metadata.len(),
        })
    }

    /// The path that the image was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Checks that the file has the `length` bytes at `offset` that its `part` takes.
    pub fn check_range(&self, part: &'static str, offset: u64, length: u64) -> Result<(), ImageError> {
        let end = offset.saturating_add(length);
        if end > self.size {
            let Image { kind, size, .. } = *self;
            return Err(ImageError::Truncated {
                kind,
                path: self.path.clone(),
                size,
                end,
                part,
            });
        }
        Ok(())
    }

    /// Reads `length` bytes at `offset`; the caller bounds `length`.
    pub fn read(&self, part: &'static str, offset: u64, length: usize) -> Result<Vec<u8>, ImageError> {
        self.check_range(part, offset, length as u64)?;
        let mut bytes = vec![0; length];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|source| self.read_error(part, source))?;
        Ok(bytes)
    }

    /// Reads `length` bytes at `offset` straight into guest memory at `address`, which nobody has written to yet: parts
    /// of zeros are left alone there, and take no memory until the guest writes to them.
    pub fn read_to_guest(
        &self,
        part: &'static str,
        offset: u64,
        length: u64,
        (memory, address): (&GuestMemory, GuestAddress),
    ) -> Result<(), ImageError> {
        self.check_range(part, offset, length)?;
        let read_error = |source| self.read_error(part, source);
        let copy = |from: u64, to: u64| {
            if from == to {
                return Ok(());
            }
            let length = usize::try_from(to - from).map_err(io::Error::other)?;
            let mut file = &self.file;
            file.seek(SeekFrom::Start(offset + from))?;
            let place = GuestAddress(address.0 + from);
            memory
                .read_exact_volatile_from(place, &mut file, length)
                .map_err(io::Error::other)
        };
        let mut buffer = vec![0; ZEROS];
        let (mut start, mut end) = (0, 0);
        while end < length {
            // Aligned in the guest, so that whole pages are left alone.
            let next = ((address.0 + end + 1).next_multiple_of(ZEROS as u64) - address.0).min(length);
            let bytes = usize::try_from(next - end).expect("at most ZEROS");
            if self
                .is_zero(offset + end, &mut buffer[..bytes])
                .map_err(read_error)?
            {
                copy(start, end).map_err(read_error)?;
                start = next;
            }
            end = next;
        }
        copy(start, end).map_err(read_error)
    }

    /// Tells whether there are only zeros at `offset`, as many as the buffer has room for.
    fn is_zero(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        // The first bytes tell most parts with something else.
        for length in [buffer.len().min(64), buffer.len()] {
            let bytes = &mut buffer[..length];
            self.file.read_exact_at(bytes, offset)?;
            if bytes[0] != 0 || bytes[1..] != bytes[..length - 1] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn read_error(&self, part: &'static str, source: io::Error) -> ImageError {
        ImageError::Read {
            kind: self.kind,
            path: self.path.clone(),
            part,
            source,
        }
    }
}

/// Opening a pipe that nobody writes to would wait for ever.
fn open_without_blocking(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryBackend;
    use vmm_sys_util::tempdir::TempDir;

    use super::*;
    use crate::memory;

    #[test]
    fn names_a_missing_file() {
        let error = Image::open(ImageKind::Kernel, Path::new("/nonexistent/vmlinux")).unwrap_err();

        assert_eq!(
            error.to_string(),
            "cannot open the kernel image /nonexistent/vmlinux: check the path, and that every folder in it is there"
        );
    }

    #[test]
    fn refuses_a_directory() {
        let error = Image::open(ImageKind::Initrd, Path::new("/")).unwrap_err();

        assert_eq!(
            error.to_string(),
            "the initrd / is a directory: give the path of a regular file"
        );
    }

    #[test]
    fn refuses_a_pipe_without_waiting_for_a_writer() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("pipe");
        let c_path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the path is a valid C string.
        assert_eq!(unsafe { libc::mkfifo(c_path.as_ptr(), 0o600) }, 0);

        assert!(matches!(
            Image::open(ImageKind::Kernel, &path),
            Err(ImageError::NotAFile { .. })
        ));
    }

    #[test]
    fn refuses_an_empty_file() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("empty");
        std::fs::write(&path, "").unwrap();

        assert!(matches!(
            Image::open(ImageKind::Kernel, &path),
            Err(ImageError::Empty { .. })
        ));
    }

    #[test]
    fn reads_past_the_end_are_an_error_that_tells_the_sizes() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("short");
        std::fs::write(&path, "12345").unwrap();
        let image = Image::open(ImageKind::Kernel, &path).unwrap();

        let message = image.read("header", 4, 2).unwrap_err().to_string();

        assert!(
            message.ends_with("it has 5 bytes, and 6 are needed for its header"),
            "{message}"
        );
    }

    #[test]
    fn reads_to_the_guest_by_position() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("image");
        std::fs::write(&path, "0123456789").unwrap();
        let image = Image::open(ImageKind::Initrd, &path).unwrap();
        let memory = memory::create(1).unwrap();

        image
            .read_to_guest("content", 3, 4, (&memory, GuestAddress(0x100)))
            .unwrap();

        assert_eq!(
            memory.read_obj::<[u8; 5]>(GuestAddress(0x100)).unwrap(),
            *b"3456\0"
        );
    }

    #[test]
    fn zeros_may_end_where_memory_does() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("image");
        std::fs::write(&path, [0; 70_000]).unwrap();
        let image = Image::open(ImageKind::Initrd, &path).unwrap();
        let memory = memory::create(1).unwrap();
        let start = GuestAddress((1 << 20) - 70_000);

        image
            .read_to_guest("content", 0, 70_000, (&memory, start))
            .unwrap();

        assert_eq!(memory.read_obj::<u64>(start).unwrap(), 0);
    }

    /// Whether the host has a page for any byte of two MiB of guest memory (`/proc/PID/pagemap`, bit 63 of an entry).
    fn is_resident(memory: &GuestMemory, start: u64) -> bool {
        let address = memory.get_host_address(GuestAddress(start)).unwrap().addr() as u64;
        let mut entries = [0; 512 * 8];
        let map = File::open("/proc/self/pagemap").unwrap();
        map.read_exact_at(&mut entries, address / 4096 * 8).unwrap();
        entries.chunks_exact(8).any(|entry| entry[7] & 0x80 != 0)
    }

    #[test]
    fn zeros_take_no_memory_and_what_is_around_them_is_read() {
        const MIB: usize = 1 << 20;
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("image");
        let mut content = vec![0; 12 * MIB + 1];
        // The second is not among the bytes that are looked at first.
        for place in [0, 10 * MIB + 70_000, 12 * MIB] {
            content[place] = 0xa5;
        }
        std::fs::write(&path, &content).unwrap();
        let image = Image::open(ImageKind::Initrd, &path).unwrap();
        let memory = memory::create(16).unwrap();

        image
            .read_to_guest("content", 0, content.len() as u64, (&memory, GuestAddress(0x100)))
            .unwrap();

        let mut loaded = vec![0xff; content.len()];
        // Far from both ends, as a huge page of the host can begin anywhere.
        assert_eq!(
            [0, 4, 10, 12].map(|mib| is_resident(&memory, mib << 20)),
            [true, false, true, true]
        );
        memory.read_slice(&mut loaded, GuestAddress(0x100)).unwrap();
        assert!(loaded == content);
    }
}
