//! Attention of the encoder (short sequences of kept patches), of the decoder (all patches), and of an encoder that sees all
//! patches, as in fine-tuning.

use pixmim::ops::attention::{self, Backward, Forward, workspace_bytes};

use crate::{Bench, products};

pub(crate) fn bench(bench: &mut Bench) {
    let (dev, dtype) = (bench.dev.clone(), bench.dtype);
    for w in bench.workloads.clone() {
        let (kept, patches) = (w.kept(), w.config.patches());
        for (stack, tokens, dim, heads) in [
            ("encoder", 1 + kept, w.config.dim, w.config.heads),
            ("decoder", 1 + patches, w.config.decoder_dim, w.config.decoder_heads),
            ("encoder unmasked", 1 + patches, w.config.dim, w.config.heads),
        ] {
            let shape = format!("{} {stack}", w.name);
            let images = w.images;
            let (qkv, grad_out) = (
                bench.random(dtype, &[images, tokens, 3 * dim]),
                bench.random(dtype, &[images, tokens, dim]),
            );
            let mut out = bench.zeros(dtype, &[images, tokens, dim]);
            let mut lse = bench.zeros(dtype.wide(), &[images, heads, tokens]);
            let mut grad_qkv = bench.zeros(dtype, &[images, tokens, 3 * dim]);
            let mut workspace =
                bench.workspace(workspace_bytes(&dev, dtype, images, tokens, heads));
            // Two products of a head forward; backward those of the logits anew, and four gradients.
            let size = [tokens, dim, tokens];
            let work = products(2 * images, size, &[&qkv, &out, &lse]);
            bench.time("attention", "forward", &shape, work, || {
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
            let read = [&qkv, &out, &lse, &grad_out];
            let work = products(5 * images, size, &[&read[..], &[&grad_qkv]].concat());
            bench.time("attention", "backward", &shape, work, || {
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
