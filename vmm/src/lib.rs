//! The Mayfly virtual machine monitor.
