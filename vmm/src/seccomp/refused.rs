//! [`Refused`]: what a filter has refused, as text for the log.

use std::fmt;

use libc::{c_int, c_void, siginfo_t, ucontext_t};

use super::compiler;

/// Where `siginfo_t` has the number of the system call, after `si_signo`, `si_errno`, `si_code` and an address.
const NUMBER: usize = 24;

/// A system call that a filter has refused.
pub struct Refused {
    number: u32,
    args: [u64; 4],
}

impl Refused {
    /// Takes it from what the handler of SIGSYS is given.
    ///
    /// # Safety
    /// The values must be those of a SIGSYS that is from a filter.
    pub unsafe fn new(info: *const siginfo_t, context: *const c_void) -> Self {
        let context = context.cast::<ucontext_t>();
        // SAFETY: needed because the handler is given bare pointers. The caller has them from the kernel, which has
        // filled in both; a `siginfo_t` has 128 bytes, and this number is a `c_int` in it.
        let (number, registers) = unsafe {
            let number = info.cast::<u8>().add(NUMBER).cast::<c_int>().read();
            (number, (*context).uc_mcontext.gregs)
        };
        let argument =
            |register: c_int| usize::try_from(register).map_or(0, |at| registers[at].cast_unsigned());
        Self {
            number: number.cast_unsigned(),
            args: [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10].map(argument),
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thread = std::thread::current();
        let (number, [a, b, c, d]) = (self.number, self.args);
        write!(
            f,
            "The system call filter of thread '{}' has refused system call {number}: {}({a:#x}, {b:#x}, {c:#x}, {d:#x}, ..)",
            thread.name().unwrap_or("main"),
            compiler::name(number).unwrap_or("?"),
        )
    }
}
