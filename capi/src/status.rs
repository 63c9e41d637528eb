//! What a call returns, and the sentence behind it.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use pixmim_core::Error;

/// 0, or why a call failed. The values never change; new ones may be added.
pub type pixmim_status = i32;

/// Done, or enqueued.
pub const PIXMIM_OK: pixmim_status = 0;
/// A null or misaligned pointer, a value out of range, a struct of another version, tensors that overlap.
pub const PIXMIM_INVALID: pixmim_status = 1;
/// A tensor of another shape than the function takes.
pub const PIXMIM_SHAPE: pixmim_status = 2;
/// A tensor of another dtype than the function takes on this device.
pub const PIXMIM_DTYPE: pixmim_status = 3;
/// A tensor on another device than the context's.
pub const PIXMIM_DEVICE: pixmim_status = 4;
/// Too small a workspace.
pub const PIXMIM_WORKSPACE: pixmim_status = 5;
/// A model that another thread is using.
pub const PIXMIM_BUSY: pixmim_status = 6;
/// No such device, or one that cannot be used here.
pub const PIXMIM_NO_DEVICE: pixmim_status = 10;
/// Memory that could not be had.
pub const PIXMIM_OUT_OF_MEMORY: pixmim_status = 11;
/// The GPU, its driver or one of its libraries refused a call, or work enqueued before failed.
pub const PIXMIM_GPU: pixmim_status = 12;
/// A file that cannot be read or written.
pub const PIXMIM_IO: pixmim_status = 20;
/// A file that is damaged, or does not fit the model.
pub const PIXMIM_CORRUPT: pixmim_status = 21;
/// A defect of this library; what the call wrote is undefined. Please report it.
pub const PIXMIM_INTERNAL: pixmim_status = 100;

/// A status with its sentence.
pub(crate) struct Failure {
    status: pixmim_status,
    sentence: String,
}

impl Failure {
    /// An argument that cannot be used: `name` as in the header, `why` with the cure.
    pub(crate) fn invalid(name: &str, why: impl std::fmt::Display) -> Self {
        Self { status: PIXMIM_INVALID, sentence: format!("`{name}` {why}") }
    }

    pub(crate) fn new(status: pixmim_status, sentence: String) -> Self {
        Self { status, sentence }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Shape { .. } => PIXMIM_SHAPE,
            Error::DType { .. } => PIXMIM_DTYPE,
            Error::Place { .. } => PIXMIM_DEVICE,
            Error::Workspace { .. } => PIXMIM_WORKSPACE,
            Error::NoDevice { .. } => PIXMIM_NO_DEVICE,
            Error::OutOfMemory { .. } => PIXMIM_OUT_OF_MEMORY,
            Error::Gpu { .. } => PIXMIM_GPU,
            Error::Io { .. } => PIXMIM_IO,
            Error::Corrupt { .. } | Error::Data { .. } => PIXMIM_CORRUPT,
            Error::Invalid { .. } | Error::Config(_) | Error::Diverged { .. } => PIXMIM_INVALID,
            _ => PIXMIM_INTERNAL,
        };
        Self { status, sentence: error.to_string() }
    }
}

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs the body of an exported function: a failure becomes its status, with the sentence kept for this thread, and so does
/// a panic, which must not cross into C.
pub(crate) fn guard(body: impl FnOnce() -> Outcome) -> pixmim_status {
    // What the body may have left half-done is the caller's memory, which the status calls undefined.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return PIXMIM_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
            Failure::new(PIXMIM_INTERNAL, format!("a defect of pixmim, please report it: {said}"))
        }
    };
    let sentence = CString::new(failure.sentence.replace('\0', " ")).unwrap_or_default();
    // A thread that is ending has no place to keep it.
    let _ = LAST.try_with(|last| *last.borrow_mut() = sentence);
    failure.status
}

/// Why the last failing call of this thread failed, in a sentence; empty if none has. UTF-8, valid until the next call of
/// this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn pixmim_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// The name of a status, as in this header. Static.
#[unsafe(no_mangle)]
pub extern "C" fn pixmim_status_name(status: pixmim_status) -> *const c_char {
    let name: &'static CStr = match status {
        PIXMIM_OK => c"PIXMIM_OK",
        PIXMIM_INVALID => c"PIXMIM_INVALID",
        PIXMIM_SHAPE => c"PIXMIM_SHAPE",
        PIXMIM_DTYPE => c"PIXMIM_DTYPE",
        PIXMIM_DEVICE => c"PIXMIM_DEVICE",
        PIXMIM_WORKSPACE => c"PIXMIM_WORKSPACE",
        PIXMIM_BUSY => c"PIXMIM_BUSY",
        PIXMIM_NO_DEVICE => c"PIXMIM_NO_DEVICE",
        PIXMIM_OUT_OF_MEMORY => c"PIXMIM_OUT_OF_MEMORY",
        PIXMIM_GPU => c"PIXMIM_GPU",
        PIXMIM_IO => c"PIXMIM_IO",
        PIXMIM_CORRUPT => c"PIXMIM_CORRUPT",
        PIXMIM_INTERNAL => c"PIXMIM_INTERNAL",
        _ => c"an unknown status",
    };
    name.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::call;
    use crate::context::{PIXMIM_CPU, pixmim_context, pixmim_context_options};

    #[test]
    fn a_panic_in_the_threads_of_a_context_is_a_status_and_a_sentence() {
        let struct_size = size_of::<pixmim_context_options>() as u32;
        let options =
            pixmim_context_options { struct_size, threads: 2, bf16_products: 0, reserved: 0 };
        let Ok(context) = pixmim_context::new(PIXMIM_CPU, options) else { panic!("the CPU") };
        let said = || {
            // SAFETY: it is ended by a zero byte and lives until this thread's next failing call.
            unsafe { CStr::from_ptr(pixmim_last_error()) }.to_str().unwrap().to_owned()
        };
        let status = call(&context, std::ptr::null_mut(), |_| panic!("planted in call {}", 7));
        assert_eq!(status, PIXMIM_INTERNAL);
        assert_eq!(said(), "a defect of pixmim, please report it: planted in call 7");
        // The context is as good as before.
        assert_eq!(call(&context, std::ptr::null_mut(), |_| Ok(())), PIXMIM_OK);
        let refused = call(&context, std::ptr::null_mut(), |_| Err(Failure::invalid("x", "is 1")));
        assert_eq!((refused, said()), (PIXMIM_INVALID, "`x` is 1".into()));
    }
}
