//! Attention of the encoder (short sequences of kept patches) and of the decoder (all patches).

use criterion::Criterion;
use pixmim::ops::attention::{self, Backward, Forward, workspace_bytes};
use pixmim::{DType, Device};

use crate::{WORKLOADS, flops, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    let dev = Device::cpu();
    for w in WORKLOADS {
        for (stack, tokens, dim, heads) in [
            ("encoder", 1 + w.kept(), w.config.dim, w.config.heads),
            ("decoder", 1 + w.config.patches(), w.config.decoder_dim, w.config.decoder_heads),
        ] {
            let shape = format!("{} {stack}", w.name);
            let images = w.images;
            let (qkv, grad_out) =
                (random(&[images, tokens, 3 * dim]), random(&[images, tokens, dim]));
            let mut out = zeros(DType::F32, &[images, tokens, dim]);
            let mut lse = zeros(DType::F32, &[images, heads, tokens]);
            let mut grad_qkv = zeros(DType::F32, &[images, tokens, 3 * dim]);
            let mut workspace =
                zeros(DType::U8, &[workspace_bytes(&Device::cpu(), DType::F32, images, tokens)]);
            // Two products of a head forward; backward those of the logits anew, and four gradients.
            let work = |products| flops(products * images, tokens, dim, tokens);
            time(criterion, "attention", "forward", &shape, work(2), || {
                attention::forward(
                    &dev,
                    Forward {
                        out: out.view_mut(),
                        lse: lse.view_mut(),
                        qkv: qkv.view(),
                        workspace: workspace.view_mut(),
                    },
                )
            });
            time(criterion, "attention", "backward", &shape, work(5), || {
                attention::backward(
                    &dev,
                    Backward {
                        grad_qkv: grad_qkv.view_mut(),
                        grad_out: grad_out.view(),
                        out: out.view(),
                        lse: lse.view(),
                        qkv: qkv.view(),
                        workspace: workspace.view_mut(),
                    },
                )
            });
        }
    }
}
