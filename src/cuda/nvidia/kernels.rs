//! The kernels on a GPU: loaded once, found by name, launched with one struct.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;

use super::handles::{Stream, check, describe};
use crate::cuda::driver::Launch;
use crate::{Error, Result};

/// What this file calls.
pub(super) const SYMBOLS: [&str; 9] = [
    "cuFuncGetName",
    "cuFuncGetParamInfo",
    "cuFuncLoad",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuModuleEnumerateFunctions",
    "cuModuleGetFunctionCount",
    "cuModuleLoadData",
    "cuModuleUnload",
];

/// Dynamic shared memory that a kernel has without asking, in bytes.
const SHARED_BYTES: u32 = 48 << 10;
/// Names remembered for messages.
const REMEMBERED: usize = 8;

/// All kernels of the library.
#[derive(Debug)]
pub(super) struct Kernels {
    functions: HashMap<String, Function>,
    /// What `functions` point into.
    modules: Vec<Module>,
}

#[derive(Debug)]
struct Function {
    handle: sys::CUfunction,
    /// Size of its parameter.
    params_bytes: usize,
    /// Dynamic shared memory it may use by now.
    shared_bytes: AtomicU32,
}

#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: the driver's functions may be called with any kernel from any thread.
unsafe impl Send for Function {}
#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: as above, also at the same time.
unsafe impl Sync for Function {}

impl Kernels {
    /// Loads every fatbin. `gpu` is named in messages.
    pub(super) fn load(fatbins: &[(&str, &'static [u8])], gpu: &str) -> Result<Self> {
        let mut kernels = Self { functions: HashMap::new(), modules: Vec::new() };
        for (stem, image) in fatbins {
            let module = Module::load(stem, image, gpu)?;
            for function in module.functions()? {
                let (name, function) = load_function(function)?;
                kernels.functions.insert(name, function);
            }
            kernels.modules.push(module);
        }
        Ok(kernels)
    }

    /// Enqueues a kernel. `suspects` are named if the GPU reports what went wrong in earlier work.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    pub(super) fn launch(
        &self,
        launch: &Launch<'_>,
        stream: &Stream,
        suspects: &Suspects,
    ) -> Result<()> {
        let Launch { kernel, grid, block, shared_bytes, params } = *launch;
        let fail = |why: String| Error::Gpu { action: "launch", why: format!("{kernel}: {why}") };
        let Some(function) = self.functions.get(kernel) else {
            let files = self.modules.len();
            return Err(fail(format!("none of the {files} kernel files built in has it")));
        };
        if params.len() != function.params_bytes {
            let (takes, given) = (function.params_bytes, params.len());
            return Err(fail(format!("its parameter has {takes} bytes, {given} were given")));
        }
        function.allow_shared(shared_bytes)?;

        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the probe found the symbol; the function is of a module that lives as long as `self`; its first
        // parameter has the size of `params`, as checked above, and is copied before the call returns. It has no
        // second one: KERNEL() of kernels/common declares one. The addresses in it are used by the GPU only.
        let status = unsafe {
            sys::cuLaunchKernel(
                function.handle,
                grid,
                1,
                1,
                block,
                1,
                1,
                shared_bytes,
                stream.handle(),
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        if status != sys::CUresult::CUDA_SUCCESS {
            let shape = format!(
                "{grid} blocks of {block} threads with {shared_bytes} bytes of shared memory"
            );
            return Err(fail(format!("{shape}: {}", suspects.explain(status))));
        }
        suspects.push(kernel);
        Ok(())
    }
}

impl Function {
    /// Lets the kernel use so much dynamic shared memory.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn allow_shared(&self, bytes: u32) -> Result<()> {
        if bytes <= self.shared_bytes.load(Ordering::Relaxed) {
            return Ok(());
        }
        let attribute =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let value = i32::try_from(bytes).unwrap_or(i32::MAX);
        // SAFETY: the probe found the symbol; the function is of a loaded module.
        let status = unsafe { sys::cuFuncSetAttribute(self.handle, attribute, value) };
        check("give a kernel its shared memory", status)?;
        self.shared_bytes.fetch_max(bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// The image of one .cu file.
#[derive(Debug)]
struct Module {
    handle: sys::CUmodule,
}

#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: the driver's functions may be called with any module from any thread.
unsafe impl Send for Module {}
#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: as above, also at the same time.
unsafe impl Sync for Module {}

impl Module {
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn load(stem: &str, image: &'static [u8], gpu: &str) -> Result<Self> {
        let mut handle = ptr::null_mut();
        let start = image.as_ptr().cast::<c_void>();
        // SAFETY: the probe found the symbol; a context is current; the image is a whole fatbin, as nvcc wrote it, which
        // states its own length, and stays where it is; writes one pointer.
        let status = unsafe { sys::cuModuleLoadData(&raw mut handle, start) };
        if status == sys::CUresult::CUDA_SUCCESS {
            return Ok(Self { handle });
        }
        let why = format!(
            "{stem}.cu has no image for {gpu} ({}); build pixmim for its architecture",
            describe(status)
        );
        Err(Error::Gpu { action: "load its kernels", why })
    }

    /// Its kernels.
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn functions(&self) -> Result<Vec<sys::CUfunction>> {
        let mut count = 0;
        // SAFETY: the probe found the symbol; the module is loaded; writes one int.
        let status = unsafe { sys::cuModuleGetFunctionCount(&raw mut count, self.handle) };
        check("count its kernels", status)?;
        let mut functions = vec![ptr::null_mut(); count as usize];
        let start = functions.as_mut_ptr();
        // SAFETY: the probe found the symbol; the module is loaded; writes at most `count` pointers, for which there
        // is room.
        let status = unsafe { sys::cuModuleEnumerateFunctions(start, count, self.handle) };
        check("list its kernels", status)?;
        Ok(functions)
    }
}

impl Drop for Module {
    #[expect(unsafe_code, reason = "calls into libcuda")]
    fn drop(&mut self) {
        // SAFETY: the probe found the symbol; `load` loaded the module unloaded here.
        let _ = unsafe { sys::cuModuleUnload(self.handle) };
    }
}

/// Loads a kernel, which its first launch would otherwise do: that may wait for the GPU, and cannot while its stream is
/// being captured. Gives its name, and what its launches need.
#[expect(unsafe_code, reason = "calls into libcuda")]
fn load_function(handle: sys::CUfunction) -> Result<(String, Function)> {
    // SAFETY: the probe found the symbol; the function is of a loaded module.
    check("load a kernel", unsafe { sys::cuFuncLoad(handle) })?;
    let mut name = ptr::null();
    // SAFETY: the probe found the symbol; the function is of a loaded module; writes one pointer.
    check("name a kernel", unsafe { sys::cuFuncGetName(&raw mut name, handle) })?;
    // SAFETY: the call above succeeded, so this is a C string that lives as long as the module.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    let (mut offset, mut params_bytes) = (0, 0);
    // SAFETY: the probe found the symbol; the function is of a loaded module; writes two integers.
    let status =
        unsafe { sys::cuFuncGetParamInfo(handle, 0, &raw mut offset, &raw mut params_bytes) };
    if status == sys::CUresult::CUDA_ERROR_INVALID_VALUE {
        // It takes no parameter at all.
        params_bytes = 0;
    } else {
        check("ask for the size of a kernel's parameter", status)?;
    }
    Ok((name, Function { handle, params_bytes, shared_bytes: AtomicU32::new(SHARED_BYTES) }))
}

/// What was enqueued since the last wait: a GPU reports an error in its work later, and does not say whose it is.
#[derive(Debug, Default)]
pub(super) struct Suspects(Mutex<VecDeque<&'static str>>);

impl Suspects {
    /// Something was enqueued.
    pub(super) fn push(&self, name: &'static str) {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if names.back() == Some(&name) {
            return;
        }
        if names.len() == REMEMBERED {
            names.pop_front();
        }
        names.push_back(name);
    }

    /// All of it went well.
    pub(super) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// A status in words, with the suspects if it is about work enqueued before.
    pub(super) fn explain(&self, status: sys::CUresult) -> String {
        let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = describe(status);
        // From CUDA_ERROR_ILLEGAL_ADDRESS to CUDA_ERROR_LAUNCH_FAILED.
        if names.is_empty() || !(700..720).contains(&(status as u32)) {
            return text;
        }
        let names = names.iter().copied().collect::<Vec<_>>().join(", ");
        format!(
            "{text}; enqueued before, the last at the end: {names}; `compute-sanitizer` finds the access"
        )
    }
}
