//! Three ops for networks written in [candle](https://docs.rs/candle-core), which keep its autograd: the low-pass target,
//! the loss on normalised patches, and attention.
//!
//! They take and give [`candle_core::Tensor`]s of f32 or f64 in the CPU's memory, and run where all ops of this crate run
//! on the CPU: in the current rayon pool. A tensor with gaps is made contiguous first. For any other dtype or device
//! they return an error: candle's CUDA backend does not build without CUDA, and nothing here has been tried with it. On
//! a GPU call [`crate::ops`] on your own memory.
//!
//! Backward passes are this crate's, hence not differentiable a second time.

use std::sync::OnceLock;

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Error, Layout, Result, Shape, Storage,
    Tensor, bail,
};

use crate::ops::low_freq_target::Filter;
use crate::ops::{attention, low_freq_target, masked_mse_loss};
use crate::{Device, TensorMut, TensorRef};

/// How [`low_freq_target`] filters and cuts.
#[derive(Clone, Copy, Debug)]
pub struct LowFreqTarget<'a> {
    /// Made for `S` and [`Device::cpu`].
    pub filter: &'a Filter,
    /// Mean of the colours, RGB on [0, 1].
    pub mean: [f64; 3],
    /// Standard deviation of the colours.
    pub std: [f64; 3],
    /// Pixels along a side of a patch (P).
    pub patch_size: usize,
}

/// PixMIM's target ([`crate::ops::low_freq_target`]): of `pixels` `(B, 3, S, S)` on [0, 1] the masked patches after the
/// low-pass filter, `(B, M, 3 P P)` as (row, column, channel). `ids_masked` is `(B, M)`, of integers. No gradient.
///
/// # Errors
/// If a tensor is not as said, on another device, or an id names no patch.
pub fn low_freq_target(
    pixels: &Tensor,
    ids_masked: &Tensor,
    how: LowFreqTarget<'_>,
) -> Result<Tensor> {
    let pixels = taken("low_freq_target: `pixels`", pixels)?;
    let (images, masked) = ids_masked.dims2()?;
    if !ids_masked.dtype().is_int() {
        let found = ids_masked.dtype();
        bail!("low_freq_target: `ids_masked` has dtype {found:?}, takes integers");
    }
    let ids = ids_masked.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
    // An id that no i32 holds is as wrong as -1.
    let ids = ids.into_iter().map(|id| i32::try_from(id).unwrap_or(-1)).collect();
    pixels.apply_op1_no_bwd(&LowPass { ids, images, masked, how })
}

/// Mean over `B M E` of `(pred - t)^2`, both `(B, M, E)`, where `t` is `target`, or with `norm_pix` each patch of it
/// by its own mean and variance ([`crate::ops::masked_mse_loss`]). A scalar; its gradient reaches `pred` alone. Value
/// and gradient are computed together, and the gradient is kept for the backward pass.
///
/// # Errors
/// If a tensor is not as said, of another dtype than the other, or on another device.
pub fn masked_mse_loss(pred: &Tensor, target: &Tensor, norm_pix: bool) -> Result<Tensor> {
    let pred = taken("masked_mse_loss: `pred`", pred)?;
    let target = taken("masked_mse_loss: `target`", &target.detach())?;
    pred.apply_op2(&target, Loss { norm_pix, grad_pred: OnceLock::new() })
}

/// Multi-head self-attention ([`crate::ops::attention`]): of `qkv` `(B, T, 3 D)`, which holds queries, keys and values, each
/// head after head as timm packs them, `softmax(q k^T / sqrt(D / heads)) v` as `(B, T, D)`. Between the passes it keeps a
/// number for each row, never the `T x T` weights.
///
/// # Errors
/// If `qkv` is not as said, on another device, or `heads` does not divide `D`.
pub fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let qkv = taken("attention: `qkv`", qkv)?;
    let (_, _, width) = qkv.dims3()?;
    if heads == 0 || heads > width {
        bail!(
            "attention: {heads} heads share {width} numbers of a token; take at least one head, and at most one a number"
        );
    }
    qkv.apply_op1(Attention { heads, lse: OnceLock::new() })
}

/// The tensor without gaps, if it is one that this module takes.
fn taken(arg: &str, tensor: &Tensor) -> Result<Tensor> {
    if !tensor.device().is_cpu() {
        let found = tensor.device().location();
        bail!(
            "{arg} is on {found:?}; pixmim takes candle's tensors on the CPU, so move it there with to_device"
        );
    }
    if !matches!(tensor.dtype(), DType::F32 | DType::F64) {
        let found = tensor.dtype();
        bail!("{arg} has dtype {found:?}; pixmim takes F32 and F64, so convert it with to_dtype");
    }
    tensor.contiguous()
}

/// Zeros of the dtype of `like`, which [`taken`] has found to be f64 or f32.
fn zeros(like: &CpuStorage, elems: usize) -> CpuStorage {
    match like {
        CpuStorage::F64(_) => CpuStorage::F64(vec![0.0; elems]),
        _ => CpuStorage::F32(vec![0.0; elems]),
    }
}

fn view<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<TensorRef<'a>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a tensor with gaps reached pixmim")
    };
    match storage {
        CpuStorage::F32(data) => TensorRef::new(&data[start..end], layout.dims()),
        CpuStorage::F64(data) => TensorRef::new(&data[start..end], layout.dims()),
        _ => bail!("a tensor of neither F32 nor F64 reached pixmim"),
    }
    .map_err(Error::wrap)
}

fn view_mut<'a>(storage: &'a mut CpuStorage, shape: &[usize]) -> Result<TensorMut<'a>> {
    match storage {
        CpuStorage::F32(data) => TensorMut::new(data, shape),
        CpuStorage::F64(data) => TensorMut::new(data, shape),
        _ => bail!("a tensor of neither F32 nor F64 reached pixmim"),
    }
    .map_err(Error::wrap)
}

struct LowPass<'a> {
    ids: Vec<i32>,
    images: usize,
    masked: usize,
    how: LowFreqTarget<'a>,
}

impl CustomOp1 for LowPass<'_> {
    fn name(&self) -> &'static str {
        "pixmim::low_freq_target"
    }

    fn cpu_fwd(&self, pixels: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let LowFreqTarget { filter, mean, std, patch_size } = self.how;
        let side = layout.shape().dims4()?.3;
        if patch_size == 0 || patch_size > side {
            bail!(
                "low_freq_target: `patch_size` is {patch_size}, must be 1 to the {side} pixels of a side"
            );
        }
        let dev = Device::cpu();
        let shape = [self.images, self.masked, 3 * patch_size * patch_size];
        let mut target = zeros(pixels, shape.iter().product());
        let pixels = view(pixels, layout)?;
        let bytes =
            low_freq_target::workspace_bytes(&dev, pixels.dtype(), self.images, filter, true);
        let mut workspace = vec![0u8; bytes];
        let args = low_freq_target::Forward {
            target: view_mut(&mut target, &shape)?,
            pixels,
            ids_masked: TensorRef::new(&self.ids, &shape[..2]).map_err(Error::wrap)?,
            filter,
            mean,
            std,
            patch_size,
            exact: true,
            workspace: TensorMut::new(&mut workspace, &[bytes]).map_err(Error::wrap)?,
        };
        low_freq_target::forward(&dev, args).map_err(Error::wrap)?;
        Ok((target, Shape::from(&shape)))
    }
}

struct Loss {
    norm_pix: bool,
    /// `(B, M, E)`, set by the forward pass.
    grad_pred: OnceLock<Tensor>,
}

impl CustomOp2 for Loss {
    fn name(&self) -> &'static str {
        "pixmim::masked_mse_loss"
    }

    fn cpu_fwd(
        &self,
        pred: &CpuStorage,
        pred_layout: &Layout,
        target: &CpuStorage,
        target_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (images, masked, _) = pred_layout.shape().dims3()?;
        target_layout.shape().dims3()?;
        let dev = Device::cpu();
        let mut loss = zeros(pred, 1);
        let mut grad_pred = zeros(pred, pred_layout.shape().elem_count());
        let pred = view(pred, pred_layout)?;
        let bytes = masked_mse_loss::workspace_bytes(&dev, pred.dtype(), images * masked);
        let mut workspace = vec![0u8; bytes];
        let args = masked_mse_loss::ForwardBackward {
            loss: view_mut(&mut loss, &[1])?,
            grad_pred: view_mut(&mut grad_pred, pred_layout.dims())?,
            pred,
            target: view(target, target_layout)?,
            norm_pix: self.norm_pix,
            scale: 1.0,
            workspace: TensorMut::new(&mut workspace, &[bytes]).map_err(Error::wrap)?,
        };
        masked_mse_loss::forward_backward(&dev, args).map_err(Error::wrap)?;
        let grad_pred = Storage::Cpu(grad_pred);
        let shape = pred_layout.shape().clone();
        self.grad_pred
            .get_or_init(|| Tensor::from_storage(grad_pred, shape, BackpropOp::none(), false));
        Ok((loss, ().into()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad_loss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(grad_pred) = self.grad_pred.get() else {
            bail!("masked_mse_loss: backward before forward")
        };
        Ok((Some(grad_pred.broadcast_mul(grad_loss)?), None))
    }
}

struct Attention {
    heads: usize,
    /// `(B, NH, T)`, set by the forward pass.
    lse: OnceLock<CpuStorage>,
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "pixmim::attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (images, tokens, width) = layout.shape().dims3()?;
        let (dev, shape) = (Device::cpu(), [images, tokens, width / 3]);
        let mut out = zeros(qkv, shape.iter().product());
        let mut lse = zeros(qkv, images * self.heads * tokens);
        let qkv = view(qkv, layout)?;
        let bytes = attention::workspace_bytes(&dev, qkv.dtype(), images, tokens, self.heads);
        let mut workspace = vec![0u8; bytes];
        let args = attention::Forward {
            out: view_mut(&mut out, &shape)?,
            lse: view_mut(&mut lse, &[images, self.heads, tokens])?,
            qkv,
            workspace: TensorMut::new(&mut workspace, &[bytes]).map_err(Error::wrap)?,
        };
        attention::forward(&dev, args).map_err(Error::wrap)?;
        self.lse.get_or_init(|| lse);
        Ok((out, Shape::from(&shape)))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, grad_out: &Tensor) -> Result<Option<Tensor>> {
        let Some(lse) = self.lse.get() else { bail!("attention: backward before forward") };
        let op = AttentionBackward { heads: self.heads, lse };
        qkv.apply_op3_no_bwd(out, &grad_out.contiguous()?, &op).map(Some)
    }
}

struct AttentionBackward<'a> {
    heads: usize,
    lse: &'a CpuStorage,
}

impl CustomOp3 for AttentionBackward<'_> {
    fn name(&self) -> &'static str {
        "pixmim::attention's backward pass"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
        out: &CpuStorage,
        out_layout: &Layout,
        grad_out: &CpuStorage,
        grad_out_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (images, tokens, _) = qkv_layout.shape().dims3()?;
        let dev = Device::cpu();
        let mut grad_qkv = zeros(qkv, qkv_layout.shape().elem_count());
        let qkv = view(qkv, qkv_layout)?;
        let bytes = attention::workspace_bytes(&dev, qkv.dtype(), images, tokens, self.heads);
        let mut workspace = vec![0u8; bytes];
        let args = attention::Backward {
            grad_qkv: view_mut(&mut grad_qkv, qkv_layout.dims())?,
            grad_out: view(grad_out, grad_out_layout)?,
            out: view(out, out_layout)?,
            lse: view(self.lse, &Layout::contiguous((images, self.heads, tokens)))?,
            qkv,
            workspace: TensorMut::new(&mut workspace, &[bytes]).map_err(Error::wrap)?,
        };
        attention::backward(&dev, args).map_err(Error::wrap)?;
        Ok((grad_qkv, qkv_layout.shape().clone()))
    }
}
