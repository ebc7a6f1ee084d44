//! Copy-on-write images: `Qcow2` is a `Backend` over an image of QEMU's format and the files behind it.
//!
//! The crate `imago` knows where the clusters of an image are and allocates new ones. All else is here: `header` refuses
//! images that are not safe to use, `chain` opens the files, and the data go straight between the guest's pages and
//! those files. What imago writes are only tables. `journal` holds them back and writes them in an order in which the
//! image is whole at every moment, whatever of it a crash of the host loses.

mod chain;
mod error;
mod file;
mod header;
mod image;
mod journal;
mod refcounts;
mod store;

pub use error::{BackingFlaw, Error, Flaw};
pub(super) use image::Qcow2;

#[cfg(test)]
pub(super) mod tests;
