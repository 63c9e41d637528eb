//! Tensors to time ops on.

use half::bf16;
use pixmim::dtype::Element;
use pixmim::ops::random_masking::{self, Forward, Noise};
use pixmim::rng::{Purpose, Stream};
use pixmim::{DType, Device, Result, Tensor};

use crate::workload::Workload;

/// A million random numbers on [-1, 1).
pub(crate) fn noise() -> Vec<f32> {
    let noise = Stream::new(0, 0, 0, Purpose::Init);
    (0..1 << 20).map(|i| noise.word(i) as i32 as f32 / (1u64 << 31) as f32).collect()
}

/// Makes tensors of a device.
pub(crate) struct Inputs<'a> {
    pub(crate) dev: &'a Device,
    pub(crate) noise: &'a [f32],
}

impl Inputs<'_> {
    /// A tensor of zeros: for outputs and workspaces.
    pub(crate) fn zeros(&self, dtype: DType, shape: &[usize]) -> Tensor {
        let mut tensor = Tensor::new(self.dev, dtype, shape).unwrap();
        self.dev.clear(tensor.view_mut()).unwrap();
        tensor
    }

    /// A workspace of this many bytes.
    pub(crate) fn workspace(&self, bytes: usize) -> Tensor {
        self.zeros(DType::U8, &[bytes])
    }

    pub(crate) fn holding<T: Element>(&self, values: &[T], shape: &[usize]) -> Tensor {
        Tensor::holding(self.dev, values, shape).unwrap()
    }

    /// A tensor of f32, bf16 or u8 with random values, every million of them the same.
    pub(crate) fn random(&self, dtype: DType, shape: &[usize]) -> Tensor {
        match dtype {
            DType::Bf16 => self.repeat(shape, bf16::from_f32),
            DType::U8 => self.repeat(shape, |x| (128.0 + 128.0 * x) as u8),
            _ => self.repeat(shape, |x| x),
        }
    }

    fn repeat<T: Element>(&self, shape: &[usize], round: impl Fn(f32) -> T) -> Tensor {
        let mut tensor = Tensor::new(self.dev, T::DTYPE, shape).unwrap();
        let elems = tensor.view().elems();
        let noise: Vec<T> = self.noise.iter().take(elems).map(|&x| round(x)).collect();
        self.dev.fill(tensor.view_mut(), &noise).unwrap();
        tensor
    }
}

/// Which patches of each image are kept and masked, and what they are drawn from.
pub(crate) struct Masks {
    pub(crate) ids_keep: Tensor,
    pub(crate) ids_masked: Tensor,
    pub(crate) ids_restore: Tensor,
    epoch: Tensor,
    samples: Tensor,
    block: usize,
    workspace: Tensor,
}

impl Masks {
    /// As a step draws them.
    pub(crate) fn drawn(on: &Inputs<'_>, w: &Workload) -> Self {
        let (images, patches) = (w.images, w.config.patches());
        let samples: Vec<i64> = (0..images as i64).collect();
        let mut masks = Self {
            ids_keep: on.zeros(DType::I32, &[images, w.kept()]),
            ids_masked: on.zeros(DType::I32, &[images, patches - w.kept()]),
            ids_restore: on.zeros(DType::I32, &[images, patches]),
            epoch: on.holding(&[0i64], &[1]),
            samples: on.holding(&samples, &[images]),
            block: w.mask_block,
            workspace: on.workspace(random_masking::workspace_bytes(on.dev, images, patches)),
        };
        masks.draw(on.dev).unwrap();
        masks
    }

    pub(crate) fn draw(&mut self, dev: &Device) -> Result<()> {
        random_masking::forward(
            dev,
            Forward {
                ids_keep: self.ids_keep.view_mut(),
                ids_masked: self.ids_masked.view_mut(),
                ids_restore: self.ids_restore.view_mut(),
                noise: Noise::Drawn {
                    seed: 0,
                    epoch: self.epoch.view(),
                    samples: self.samples.view(),
                },
                block: self.block,
                workspace: self.workspace.view_mut(),
            },
        )
    }
}
