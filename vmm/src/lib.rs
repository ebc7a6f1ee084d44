//! The VM process: from a config or API requests to a running machine. The binary `mayfly` is a thin shell around it.
//!
//! Reading order: [`config`] (what the user asks), [`api`] (requests to actions), [`controller`] (actions carried out),
//! [`vm`] (the machine), [`boot`] and [`device_set`] (what it is made of).

pub mod api;
pub mod args;
pub mod boot;
mod boot_timer;
pub mod clock;
pub mod config;
pub mod control_loop;
pub mod controller;
pub mod device_memory;
pub mod device_set;
pub mod error;
pub mod event_loop;
pub mod events;
mod interrupt_lines;
pub mod kvm;
pub mod landlock;
pub mod legacy;
pub mod logger;
pub mod memory;
pub mod metrics;
mod rehearsal;
pub mod seccomp;
pub mod signals;
pub mod start;
pub mod terminal;
pub mod unplug;
pub mod vcpu;
pub mod vm;
pub mod x86_64;
