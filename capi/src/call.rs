//! The arguments of one call, from what a caller described to views that an op takes.

use std::cell::RefCell;
use std::ffi::c_void;
use std::ops::Range;

use pixmim_core::{Device, Place, TensorMut, TensorRef};

use crate::context::{PIXMIM_CPU, pixmim_context};
use crate::status::{Failure, Outcome, PIXMIM_DEVICE, PIXMIM_SHAPE, guard, pixmim_status};
use crate::tensor::{Described, pixmim_tensor, pointee, pointee_mut};

/// A call while its arguments are read: it remembers which bytes were seen, since what is written may overlap nothing else.
pub(crate) struct Call<'a> {
    pub(crate) dev: &'a Device,
    device: i32,
    seen: RefCell<Vec<Seen>>,
}

struct Seen {
    name: &'static str,
    bytes: Range<usize>,
    written: bool,
}

/// A raw pointer on its way into the context's threads, which the caller waits for.
struct Sent<T>(T);

// SAFETY: `run` returns once the body is done, so it is as if the caller's thread had run it.
unsafe impl<T> Send for Sent<T> {}

impl<T> Sent<T> {
    /// By a method, so that a closure takes the whole and not its field.
    fn get(self) -> T {
        self.0
    }
}

/// Runs the body of an exported function of a context.
pub(crate) fn call(
    context: *const pixmim_context,
    stream: *mut c_void,
    body: impl FnOnce(&Call<'_>) -> Outcome,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it came from `pixmim_context_create`.
        run(unsafe { pointee("context", context) }?, stream, body)
    })
}

/// Runs the body of a call in the context's threads.
pub(crate) fn run(
    context: &pixmim_context,
    stream: *mut c_void,
    body: impl FnOnce(&Call<'_>) -> Outcome,
) -> Outcome {
    let body = Sent(body);
    context.run(stream, move |dev| {
        let call = Call { dev, device: context.device, seen: RefCell::default() };
        body.get()(&call)
    })
}

impl Call<'_> {
    /// Shape and dtype of a tensor, to work out a workspace; its data may be NULL.
    pub(crate) fn describe(
        &self,
        name: &'static str,
        tensor: *const pixmim_tensor,
    ) -> Outcome<Described> {
        // SAFETY: the header asks of the caller that it is NULL or leads to a tensor.
        unsafe { Described::new(name, tensor) }
    }

    /// A tensor that the op reads.
    pub(crate) fn read<'a>(
        &self,
        name: &'static str,
        tensor: *const pixmim_tensor,
    ) -> Outcome<TensorRef<'a>> {
        let found = self.describe(name, tensor)?;
        self.expect_device(name, &found)?;
        self.view(name, found)
    }

    /// A tensor that is copied from, on the device or the host.
    pub(crate) fn copy_from<'a>(
        &self,
        name: &'static str,
        tensor: *const pixmim_tensor,
    ) -> Outcome<TensorRef<'a>> {
        let found = self.describe(name, tensor)?;
        self.expect_device_or_host(name, &found)?;
        self.view(name, found)
    }

    fn view<'a>(&self, name: &'static str, found: Described) -> Outcome<TensorRef<'a>> {
        let (place, found) = (self.place(&found), self.claim(name, found, false)?);
        // SAFETY: the header asks of the caller that `data` leads to such elements until the work is done; `claim` has seen
        // that nothing of the call writes them.
        let view = unsafe { TensorRef::from_raw(place, found.data, found.dtype, &found.dims) };
        view.map_err(|error| named(name, error))
    }

    /// A tensor that the op writes or updates.
    pub(crate) fn write<'a>(
        &self,
        name: &'static str,
        tensor: *const pixmim_tensor,
    ) -> Outcome<TensorMut<'a>> {
        let found = self.describe(name, tensor)?;
        self.expect_device(name, &found)?;
        self.view_mut(name, found)
    }

    /// A tensor that is copied to, on the device or the host.
    pub(crate) fn copy_to<'a>(
        &self,
        name: &'static str,
        tensor: *const pixmim_tensor,
    ) -> Outcome<TensorMut<'a>> {
        let found = self.describe(name, tensor)?;
        self.expect_device_or_host(name, &found)?;
        self.view_mut(name, found)
    }

    fn view_mut<'a>(&self, name: &'static str, found: Described) -> Outcome<TensorMut<'a>> {
        let (place, found) = (self.place(&found), self.claim(name, found, true)?);
        // SAFETY: as in `view`; `claim` has seen that no other argument of the call shares a byte with it.
        let view = unsafe { TensorMut::from_raw(place, found.data, found.dtype, &found.dims) };
        view.map_err(|error| named(name, error))
    }

    /// The workspace, if it was given: else only its size is asked for, and told.
    pub(crate) fn workspace<'a>(
        &self,
        workspace: *mut c_void,
        workspace_bytes: *mut usize,
        needed: usize,
    ) -> Outcome<Option<TensorMut<'a>>> {
        // SAFETY: the header asks of the caller that it leads to a number, which nobody else uses.
        let bytes = unsafe { pointee_mut("workspace_bytes", workspace_bytes) }?;
        // Never 0, for which many an allocator gives NULL.
        let needed = needed.max(1).next_multiple_of(256);
        if workspace.is_null() {
            *bytes = needed;
            return Ok(None);
        }
        let found = Described {
            dtype: pixmim_core::DType::U8,
            device: self.device,
            data: workspace.cast(),
            dims: vec![*bytes],
        };
        self.view_mut("workspace", found).map(Some)
    }

    /// Refuses a tensor of another device.
    fn expect_device(&self, name: &str, found: &Described) -> Outcome {
        if found.device == self.device {
            return Ok(());
        }
        let named = |device: i32| match device {
            PIXMIM_CPU => "the CPU (-1)".to_owned(),
            ordinal => format!("GPU {ordinal}"),
        };
        let (on, ours) = (named(found.device), named(self.device));
        let why = format!("`{name}` is on {on}, the context is for {ours}; copy it there first");
        Err(Failure::new(PIXMIM_DEVICE, why))
    }

    fn expect_device_or_host(&self, name: &str, found: &Described) -> Outcome {
        if found.device == PIXMIM_CPU { Ok(()) } else { self.expect_device(name, found) }
    }

    /// Where a tensor of the device or the host is.
    fn place(&self, found: &Described) -> Place {
        if found.device == PIXMIM_CPU { Place::Host } else { self.dev.place() }
    }

    /// Refuses a tensor that overlaps another of the call if either is written.
    pub(crate) fn claim(
        &self,
        name: &'static str,
        found: Described,
        written: bool,
    ) -> Outcome<Described> {
        if found.data.is_null() && found.elems() > 0 {
            return Err(Failure::invalid(name, "has NULL for its data"));
        }
        let start = found.data.addr();
        if found.device != PIXMIM_CPU && !start.is_multiple_of(16) && found.elems() > 0 {
            let why =
                format!("starts at address {start:#x}; on a GPU it starts at a multiple of 16");
            return Err(Failure::invalid(name, why));
        }
        let bytes = start..start.saturating_add(found.bytes());
        let mut seen = self.seen.borrow_mut();
        let overlaps = |other: &&Seen| {
            (written || other.written)
                && bytes.start < other.bytes.end
                && other.bytes.start < bytes.end
        };
        if let Some(other) = seen.iter().find(overlaps) {
            let why = format!("overlaps `{}`, and one of them is written", other.name);
            return Err(Failure::invalid(name, why));
        }
        seen.push(Seen { name, bytes, written });
        Ok(found)
    }
}

/// What is wrong with the memory of an argument, under its own name.
fn named(name: &str, error: pixmim_core::Error) -> Failure {
    match error {
        pixmim_core::Error::Invalid { why, .. } => Failure::invalid(name, why),
        pixmim_core::Error::Shape { expected, found, .. } => {
            Failure::new(PIXMIM_SHAPE, format!("`{name}` has shape {found:?}, expected {expected}"))
        }
        other => other.into(),
    }
}

/// A size given as a number: not negative, and small enough that products of sizes do not overflow.
pub(crate) fn size(name: &str, value: i64) -> Outcome<usize> {
    const MOST: usize = 1 << 20;
    usize::try_from(value)
        .ok()
        .filter(|&value| value <= MOST)
        .ok_or_else(|| Failure::invalid(name, format!("is {value}; it lies between 0 and {MOST}")))
}

/// A flag.
pub(crate) fn flag(name: &str, value: i32) -> Outcome<bool> {
    match value {
        0 | 1 => Ok(value == 1),
        _ => Err(Failure::invalid(name, format!("is {value}; it is 0 or 1"))),
    }
}

/// Three numbers.
pub(crate) fn three(name: &str, numbers: *const f64) -> Outcome<[f64; 3]> {
    // SAFETY: the header asks of the caller that it is NULL or leads to three numbers.
    unsafe { pointee(name, numbers.cast::<[f64; 3]>()) }.copied()
}
