//! A device to call ops on, memory on it, and the arguments of a call.

use std::ffi::{CString, c_void};

use pixmim_core::cuda::SimtOptions;
use pixmim_core::ops::low_freq_target::Filter;
use pixmim_core::{DType, Device, Gpu, Tensor, TensorMut, TensorRef};

use tempfile::TempDir;

use super::call::Raw;
use super::cases;
use crate::context::{PIXMIM_CPU, pixmim_context, pixmim_context_options};
use crate::mae::{pixmim_filter, pixmim_filter_create};
use crate::model::pixmim_model;
use crate::model::state::pixmim_model_state_info;
use crate::status::PIXMIM_OK;
use crate::tensor::{PIXMIM_MAX_DIMS, pixmim_tensor};

/// Pixels of a side of the images that `Lab::filter` is for, and its radius.
pub(super) const SIDE: usize = 12;
pub(super) const RADIUS: f64 = 2.5;

/// A device in a context, and what the cases on it are made with.
pub(super) struct Lab {
    pub(super) dev: Device,
    /// `device` of its tensors.
    pub(super) device: i32,
    /// What it stores.
    pub(super) real: DType,
    pub(super) context: Box<pixmim_context>,
    filter: *mut pixmim_filter,
    pub(super) rust_filter: Filter,
    pub(super) model: *mut pixmim_model,
    /// Shape of its first weight.
    pub(super) first_weight: Vec<usize>,
    /// A file with its weights, but for f64, which no file has.
    pub(super) weights: CString,
    _folder: TempDir,
}

impl Lab {
    /// The CPU in f32 and f64, the host executor in f32 and bf16.
    pub(super) fn all() -> Vec<Self> {
        let options = pixmim_context_options {
            struct_size: size_of::<pixmim_context_options>() as u32,
            threads: 2,
            bf16_products: 0,
            reserved: 0,
        };
        let cpu = |real| {
            let Ok(context) = pixmim_context::new(PIXMIM_CPU, options) else { panic!("the CPU") };
            Self::new(Device::cpu(), PIXMIM_CPU, real, context)
        };
        let simt = |real| {
            let dev = Device::Cuda(Gpu::simt(SimtOptions::default()).unwrap());
            Self::new(dev.clone(), 0, real, pixmim_context::with(0, dev, None))
        };
        vec![cpu(DType::F32), cpu(DType::F64), simt(DType::F32), simt(DType::Bf16)]
    }

    fn new(dev: Device, device: i32, real: DType, context: pixmim_context) -> Self {
        let (context, mut filter) = (Box::new(context), std::ptr::null_mut());
        let (size, stream) = (SIDE as i64, std::ptr::null_mut());
        // SAFETY: a context, and a place for a filter.
        let status =
            unsafe { pixmim_filter_create(&raw const *context, size, RADIUS, &mut filter, stream) };
        assert_eq!(status, PIXMIM_OK);
        let rust_filter = Filter::new(&dev, SIDE, RADIUS).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let weights = folder.path().join("weights.safetensors");
        let weights = CString::new(weights.to_str().unwrap()).unwrap();
        let model = cases::model::model(&context, real, &weights);
        // SAFETY: zeros are a tensor of nothing; the model is alive.
        let first = unsafe {
            let mut first = std::mem::zeroed::<pixmim_tensor>();
            let name = std::ptr::null_mut();
            assert_eq!(pixmim_model_state_info(model, 0, name, &raw mut first), PIXMIM_OK);
            first
        };
        let first_weight = first.shape[..first.ndim as usize].iter().map(|&n| n as usize).collect();
        let _folder = folder;
        Self {
            dev,
            device,
            real,
            context,
            filter,
            rust_filter,
            model,
            first_weight,
            weights,
            _folder,
        }
    }

    pub(super) fn is_cpu(&self) -> bool {
        self.device == PIXMIM_CPU
    }

    /// A tensor that the call writes.
    pub(super) fn out(&self, dtype: DType, shape: &[usize]) -> Arg {
        let mut memory = Memory::new(self, dtype, shape);
        memory.is_written = true;
        Arg::Tensor(memory)
    }

    /// A tensor that it reads.
    pub(super) fn inp(&self, dtype: DType, shape: &[usize]) -> Arg {
        Arg::Tensor(Memory::new(self, dtype, shape))
    }

    /// A tensor that holds these numbers.
    pub(super) fn holding(&self, dtype: DType, shape: &[usize], values: &[i64]) -> Arg {
        let mut memory = Memory::new(self, dtype, shape);
        memory.fill(&self.dev, |i| values[i] as f64);
        Arg::Tensor(memory)
    }

    pub(super) fn filter(&self) -> Arg {
        Arg::Word(Raw::address(self.filter))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // SAFETY: from their `create`, and used no more.
        unsafe {
            crate::mae::pixmim_filter_destroy(self.filter);
            crate::model::pixmim_model_destroy(self.model);
        }
    }
}

/// An argument and the memory behind it.
pub(super) enum Arg {
    Word(Raw),
    Tensor(Memory),
    /// A tensor of which the header says that it may be left out.
    NoTensor,
    /// A struct, some numbers, a place for a pointer.
    Block(Box<[u64]>),
    Workspace(Option<Memory>),
}

impl Arg {
    pub(super) fn raw(&self) -> Raw {
        match self {
            Self::Word(raw) => *raw,
            Self::Tensor(memory) => Raw::address(&raw const *memory.tensor),
            Self::NoTensor | Self::Workspace(None) => Raw::Word(0),
            Self::Block(words) => Raw::address(words.as_ptr()),
            Self::Workspace(Some(memory)) => Raw::address(memory.tensor.data),
        }
    }

    /// What lies behind it, bit by bit.
    pub(super) fn content(&self, dev: &Device) -> Vec<u8> {
        match self {
            Self::Block(words) => words.iter().flat_map(|word| word.to_le_bytes()).collect(),
            _ => self.memory().map(|memory| memory.bytes(dev)).unwrap_or_default(),
        }
    }

    pub(super) fn memory(&self) -> Option<&Memory> {
        match self {
            Self::Tensor(memory) | Self::Workspace(Some(memory)) => Some(memory),
            _ => None,
        }
    }
}

/// Numbers on a device, on the host between two guards.
pub(super) struct Memory {
    pub(super) tensor: Box<pixmim_tensor>,
    pub(super) dtype: DType,
    pub(super) dims: Vec<usize>,
    pub(super) is_written: bool,
    owner: Owner,
}

enum Owner {
    Host(Vec<u64>),
    #[expect(dead_code, reason = "it owns")]
    Gpu(Tensor),
}

/// Words before and after a tensor on the host.
const GUARD: usize = 16;
const GUARD_WORD: u64 = 0xA5C3_96F0_0F69_3C5A;

impl Memory {
    /// Numbers on (0, 1], the same for each tensor of so many, or small ones if they are integers.
    pub(super) fn new(lab: &Lab, dtype: DType, dims: &[usize]) -> Self {
        let elems: usize = dims.iter().product();
        let (owner, data): (_, *mut c_void) = if lab.is_cpu() {
            let bytes = elems * dtype.size_bytes();
            let mut words = vec![GUARD_WORD; bytes.div_ceil(8) + 2 * GUARD];
            // The last element ends where the guard starts.
            let end = words.len() - GUARD;
            let data = words[end..].as_mut_ptr().wrapping_byte_sub(bytes).cast();
            (Owner::Host(words), data)
        } else {
            let tensor = Tensor::new(&lab.dev, dtype, &[elems]).unwrap();
            let data = tensor.view().as_ptr().cast_mut().cast();
            (Owner::Gpu(tensor), data)
        };
        let mut tensor = pixmim_tensor {
            struct_size: size_of::<pixmim_tensor>() as u32,
            dtype: dtype as i32,
            device: lab.device,
            ndim: dims.len() as i32,
            data,
            shape: [0; PIXMIM_MAX_DIMS],
            strides: [0; PIXMIM_MAX_DIMS],
        };
        let mut stride = 1;
        for (axis, &extent) in dims.iter().enumerate().rev() {
            (tensor.shape[axis], tensor.strides[axis]) = (extent as i64, stride);
            stride *= extent as i64;
        }
        let (tensor, dims) = (Box::new(tensor), dims.to_vec());
        let mut memory = Self { tensor, dtype, dims, is_written: false, owner };
        memory.fill(&lab.dev, |i| {
            f64::from((i as u32 + 1).wrapping_mul(0x9E37_79B1) >> 8) / 16_777_216.0
        });
        memory
    }

    /// Each number by its index, rounded to the dtype.
    fn fill(&mut self, dev: &Device, value: impl Fn(usize) -> f64) {
        let bytes: Vec<u8> = (0..self.dims.iter().product())
            .flat_map(|i| {
                let x = value(i);
                match self.dtype {
                    DType::F32 => (x as f32).to_le_bytes().to_vec(),
                    DType::F64 => x.to_le_bytes().to_vec(),
                    DType::Bf16 => (x as f32).to_le_bytes()[2..].to_vec(),
                    DType::I32 => (x as i32).to_le_bytes().to_vec(),
                    DType::I64 => (x as i64).to_le_bytes().to_vec(),
                    _ => vec![(255.0 * x) as u8],
                }
            })
            .collect();
        let place = dev.place();
        // SAFETY: memory of `bytes.len()` bytes that this borrows.
        let view = unsafe {
            TensorMut::from_raw(place, self.tensor.data.cast(), DType::U8, &[bytes.len()]).unwrap()
        };
        dev.upload(view, &bytes).unwrap();
    }

    /// What is there, bit by bit.
    pub(super) fn bytes(&self, dev: &Device) -> Vec<u8> {
        let bytes = self.dims.iter().product::<usize>() * self.dtype.size_bytes();
        // SAFETY: so many bytes are there.
        let view = unsafe {
            TensorRef::from_raw(dev.place(), self.tensor.data.cast(), DType::U8, &[bytes]).unwrap()
        };
        dev.download(view).unwrap()
    }

    /// Fails if anything around it was written. The executor sees that by itself.
    pub(super) fn expect_guards(&self, what: &str) {
        if let Owner::Host(words) = &self.owner {
            let guards = words[..GUARD].iter().chain(&words[words.len() - GUARD..]);
            assert!(guards.into_iter().all(|&word| word == GUARD_WORD), "{what}: wrote around");
        }
    }

    pub(super) fn write(&self, dev: &Device) -> TensorMut<'_> {
        let data = self.tensor.data.cast();
        // SAFETY: such numbers are there, and a case asks for each memory once.
        unsafe { TensorMut::from_raw(dev.place(), data, self.dtype, &self.dims).unwrap() }
    }

    pub(super) fn read(&self, dev: &Device) -> TensorRef<'_> {
        let data = self.tensor.data.cast();
        // SAFETY: such numbers are there, and nothing of the case writes them.
        unsafe { TensorRef::from_raw(dev.place(), data, self.dtype, &self.dims).unwrap() }
    }
}
