//! Opens an image and the files behind it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::FormatAccess;
use imago::qcow2::Qcow2 as Image;
use imago::raw::Raw as RawFormat;

use super::error::{BackingFlaw, Error, Flaw};
use super::file::HostFile;
use super::header::{Backing, Header};
use super::journal::Journal;
use super::store::Store;
use crate::virtio::block::backend::MAX_FILES;
use crate::virtio::block::raw::Raw;
use crate::virtio::block::{Backend, OpenError};
use crate::virtio::image_lock::Lock;

/// More images behind one another are refused.
const MAX_DEPTH: usize = MAX_FILES - 1;
/// What an image may grow by beyond twice its disk: tables, and the refcounts of all.
const ROOM_FOR_TABLES: u64 = 1 << 30;

/// Which files may be opened behind an image.
#[derive(Debug, Clone)]
pub(in crate::virtio::block) enum Allowed<'a> {
    /// Just these, the one nearest to the image first.
    Files(&'a [String]),
    /// Whatever the images name.
    Any,
}

/// How to open an image and what is behind it.
pub(in crate::virtio::block) struct Opener<'a> {
    pub(in crate::virtio::block) read_only: bool,
    /// Past the page cache.
    pub(in crate::virtio::block) direct: bool,
    pub(in crate::virtio::block) allowed: Allowed<'a>,
    /// Locks that the drive has already.
    pub(in crate::virtio::block) held: &'a [Lock],
}

/// An open image with all that is behind it.
pub(super) struct Opened {
    pub(super) format: FormatAccess<Store>,
    pub(super) store: Store,
    pub(super) cluster: u64,
    pub(super) files: Files,
}

/// The files of an image and of those behind it, in order.
pub(super) struct Files {
    pub(super) locks: Vec<Lock>,
    pub(super) open: Vec<Arc<File>>,
    /// Whether they all are in the host's memory.
    pub(super) in_memory: bool,
}

impl Files {
    fn of(backend: &dyn Backend) -> Self {
        Self {
            locks: backend.locks().to_vec(),
            open: backend.files(),
            in_memory: backend.in_memory(),
        }
    }

    fn append(&mut self, mut behind: Self) {
        self.locks.append(&mut behind.locks);
        self.open.append(&mut behind.open);
        self.in_memory &= behind.in_memory;
    }
}

impl Opener<'_> {
    /// Opens the image at `path`, whose file is open already, and what is behind it. Writes nothing.
    pub(super) fn open(mut self, path: &Path, file: Box<dyn Backend>) -> Result<Opened, OpenError> {
        let opened = self.open_image(path, file, self.read_only, 0)?;
        match self.allowed {
            Allowed::Files([name, ..]) => Err(flawed(path, BackingFlaw::Unneeded { name: name.clone() })),
            _ => Ok(opened),
        }
    }

    fn open_image(
        &mut self,
        path: &Path,
        file: Box<dyn Backend>,
        read_only: bool,
        depth: usize,
    ) -> Result<Opened, OpenError> {
        let mut files = Files::of(&*file);
        let mut file = HostFile::new(file);
        let header = Header::read(&file, read_only).map_err(|flaw| flawed(path, flaw))?;
        if !read_only {
            file.let_grow(header.size.saturating_mul(2).saturating_add(ROOM_FOR_TABLES));
        }
        let backing = match &header.backing {
            Some(backing) => Some(self.open_backing(path, backing, depth, &mut files)?),
            None => None,
        };
        let store = Store::new(path.to_owned(), depth, file, Journal::new(&header));
        let mut image =
            Image::<Store>::open_image(store.clone(), !read_only).map_err(|error| flawed(path, error))?;
        image.set_backing(backing);
        Ok(Opened {
            format: FormatAccess::new(image),
            store,
            cluster: header.cluster,
            files,
        })
    }

    fn open_backing(
        &mut self,
        above: &Path,
        backing: &Backing,
        depth: usize,
        files: &mut Files,
    ) -> Result<FormatAccess<Store>, OpenError> {
        let refuse = |flaw: BackingFlaw| flawed(above, flaw);
        if depth == MAX_DEPTH {
            return Err(refuse(BackingFlaw::TooMany { most: MAX_DEPTH }));
        }
        let name = || backing.name.clone();
        let path = choose(above, backing, &mut self.allowed).map_err(refuse)?;
        let format = backing.format.as_deref();
        let format = format.ok_or_else(|| refuse(BackingFlaw::NoFormat { name: name() }))?;
        if !["raw", "qcow2"].contains(&format) {
            let format = format.to_owned();
            return Err(refuse(BackingFlaw::Format { name: name(), format }));
        }
        let file = Box::new(Raw::open(&path.to_string_lossy(), true, self.direct, self.held)?);
        if format == "qcow2" {
            let opened = self.open_image(&path, file, true, depth + 1)?;
            files.append(opened.files);
            return Ok(opened.format);
        }
        files.append(Files::of(&*file));
        let store = Store::new(path.clone(), depth + 1, HostFile::new(file), Journal::default());
        let raw = RawFormat::open_image(store, false).map_err(|error| flawed(&path, error))?;
        Ok(FormatAccess::new(raw))
    }
}

/// The path of the backing file of the image at `above`.
fn choose(above: &Path, backing: &Backing, allowed: &mut Allowed<'_>) -> Result<PathBuf, BackingFlaw> {
    let name = backing.name.clone();
    match allowed {
        Allowed::Files([]) => Err(BackingFlaw::Denied { name }),
        Allowed::Files([file, rest @ ..]) => {
            let path = PathBuf::from(file);
            *allowed = Allowed::Files(rest);
            Ok(path)
        }
        // QEMU knows other things than files by words before a colon.
        Allowed::Any if name.split('/').next().is_some_and(|first| first.contains(':')) => {
            Err(BackingFlaw::NotAFile { name })
        }
        Allowed::Any => Ok(above.parent().unwrap_or(Path::new("")).join(name)),
    }
}

pub(super) fn flawed(path: &Path, flaw: impl Into<Flaw>) -> OpenError {
    OpenError::Qcow2(Box::new(Error {
        path: path.display().to_string(),
        flaw: flaw.into(),
    }))
}
