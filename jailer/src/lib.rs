//! The library of `mayfly-jailer`, which makes a jail for one VM and starts `mayfly` in it, as root or as an ordinary
//! user.
//!
//! [`args`] becomes a [`plan`], which is plain data. [`outside`] is this process: it makes the [`jail`]'s files, its
//! [`cgroup`]s and a process in new namespaces. [`inside`] is that process: it changes its file system ([`mounts`]), gives up
//! its rights ([`confine`]) and becomes the monitor. Every step can be done again, so that a jailer killed between any two
//! leaves nothing that is in the way of the next. Nothing here runs once the monitor does, but a wait for its end.

pub mod args;
pub mod cgroup;
pub mod cleanup;
pub mod clock;
pub mod confine;
pub mod error;
pub mod fsat;
pub mod import;
pub mod inside;
pub mod jail;
pub mod mounts;
pub mod outside;
pub mod plan;
pub mod record;
pub mod signals;
pub mod subids;
