//! Why an image cannot be used: [`Flaw`], and of which image: [`Error`].

use std::io;

/// An image that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the qcow2 image '{path}': {flaw}")]
pub struct Error {
    /// The image.
    pub path: String,
    /// Why not.
    pub flaw: Flaw,
}

/// What keeps an image from being used, with the remedy. Nothing was written to it.
#[derive(Debug, thiserror::Error)]
pub enum Flaw {
    /// No qcow2 header.
    #[error(
        "it has no qcow2 header: leave format out for a raw image, or convert it (qemu-img convert -O qcow2)"
    )]
    NotQcow2,
    /// Of a version that is not known.
    #[error("it is of version {version}, and only 2 and 3 are known: convert it (qemu-img convert -O qcow2)")]
    Version {
        /// What it says.
        version: u32,
    },
    /// A disk of no sector.
    #[error("its disk has not one sector of 512 bytes: make it larger (qemu-img resize)")]
    Empty,
    /// The drive works on it already, and two that change its tables would destroy it.
    #[error("the drive has it open already, so there is nothing to change")]
    Open,
    /// Encrypted.
    #[error(
        "it is encrypted: decrypt it (qemu-img convert -O qcow2) and keep it on an encrypted file system"
    )]
    Encrypted,
    /// The dirty bit is set.
    #[error(
        "whoever wrote to it last did not close it (the dirty bit is set): repair it (qemu-img check -r all)"
    )]
    Dirty,
    /// The corrupt bit is set.
    #[error("it is marked as corrupt: repair it (qemu-img check -r all)")]
    Corrupt,
    /// Its data are in another file.
    #[error("its data are in an external data file: make one file of both (qemu-img convert -O qcow2)")]
    ExternalData,
    /// Features that are not known.
    #[error(
        "it has incompatible features that are not known (bits {bits:#x}): convert it (qemu-img convert -O qcow2 \
         -o compression_type=zlib,extended_l2=off)"
    )]
    Features {
        /// The bits of its header.
        bits: u64,
    },
    /// Extensions that writes make stale.
    #[error(
        "it has extensions, such as bitmaps, that a write would make stale (autoclear bits {bits:#x}): remove them \
         (qemu-img bitmap --remove), or set is_read_only"
    )]
    Autoclear {
        /// The bits of its header.
        bits: u64,
    },
    /// Something in it cannot be.
    #[error("{what} is not valid: see what is wrong with it (qemu-img check), or take a copy that is good")]
    Malformed {
        /// What.
        what: &'static str,
    },
    /// What is behind it cannot be used.
    #[error(transparent)]
    Backing(#[from] BackingFlaw),
    /// The host failed to read it.
    #[error("{0}")]
    Host(#[from] io::Error),
}

/// What is wrong with what an image says of its backing file, or the user says of it.
#[derive(Debug, thiserror::Error)]
pub enum BackingFlaw {
    /// Nobody allowed it.
    #[error(
        "it has the backing file '{name}', and nothing allows to open that: name it in backing_files, or set backing \
         to \"allow\" to open whatever the image names"
    )]
    Denied {
        /// As the header has it.
        name: String,
    },
    /// Named, but the image has none.
    #[error("it has no backing file, and backing_files names '{name}' for it: leave that out")]
    Unneeded {
        /// As the user has it.
        name: String,
    },
    /// Its format is not known.
    #[error(
        "it does not say which format its backing file '{name}' has: say it (qemu-img rebase -u -b '{name}' -F raw, or \
         -F qcow2)"
    )]
    NoFormat {
        /// As the header has it.
        name: String,
    },
    /// Its format is one that is not supported.
    #[error(
        "its backing file '{name}' has the format '{format}', and only raw and qcow2 are supported: convert it"
    )]
    Format {
        /// As the header has it.
        name: String,
        /// What the header says.
        format: String,
    },
    /// Not a plain file.
    #[error("its backing file '{name}' is not a plain file name: name the file in backing_files")]
    NotAFile {
        /// As the header has it.
        name: String,
    },
    /// Too many, or a circle.
    #[error(
        "there are more than {most} backing files behind it, or they form a circle: flatten it (qemu-img convert)"
    )]
    TooMany {
        /// How many there may be.
        most: usize,
    },
}
