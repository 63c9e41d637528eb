//! Attention of the encoder (short sequences of kept patches), of the decoder (all patches), and of an encoder that
//! sees all patches, as in fine-tuning.

use pixmim::ops::attention::{self, Backward, Forward, workspace_bytes};
use pixmim::ops::cost;

use super::{Stack, stacks};
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    let dtype = bench.dtype(bench.precision);
    for w in bench.networks.clone() {
        let (tokens, dim, heads) = (1 + w.config.patches(), w.config.dim, w.config.heads);
        let mut stacks: Vec<_> = stacks(&w).into_iter().map(|stack| (stack, w.images)).collect();
        // Four times the tokens, a quarter of the images.
        let unmasked = Stack { name: "encoder unmasked", tokens, dim, heads };
        stacks.push((unmasked, w.images.div_ceil(4)));
        for (Stack { name, tokens, dim, heads }, batch) in stacks {
            let shape = &format!("{} {name}", w.name);
            let (mixed, packed) = ([batch, tokens, dim], [batch, tokens, 3 * dim]);
            let rows = [batch, heads, tokens];
            let case = Case {
                op: "attention",
                direction: "forward",
                shape,
                batch,
                precision: None,
                cost: cost::attention_forward(dtype, [batch, tokens, heads, dim]),
            };
            bench.time(case, |on| {
                let qkv = on.random(dtype, &packed);
                let mut out = on.zeros(dtype, &mixed);
                let mut lse = on.zeros(dtype.wide(), &rows);
                let bytes = workspace_bytes(on.dev, dtype, batch, tokens, heads);
                let mut workspace = on.workspace(bytes);
                move |dev| {
                    attention::forward(
                        dev,
                        Forward {
                            out: out.view_mut(),
                            lse: lse.view_mut(),
                            qkv: qkv.view(),
                            workspace: workspace.view_mut(),
                        },
                    )
                }
            });
            let case = Case {
                op: "attention",
                direction: "backward",
                shape,
                batch,
                precision: None,
                cost: cost::attention_backward(dtype, [batch, tokens, heads, dim]),
            };
            bench.time(case, |on| {
                let qkv = on.random(dtype, &packed);
                let (out, grad_out) = (on.random(dtype, &mixed), on.random(dtype, &mixed));
                // Weights that do not add up to one take as long.
                let lse = on.random(dtype.wide(), &rows);
                let mut grad_qkv = on.zeros(dtype, &packed);
                let bytes = workspace_bytes(on.dev, dtype, batch, tokens, heads);
                let mut workspace = on.workspace(bytes);
                move |dev| {
                    attention::backward(
                        dev,
                        Backward {
                            grad_qkv: grad_qkv.view_mut(),
                            grad_out: grad_out.view(),
                            out: out.view(),
                            lse: lse.view(),
                            qkv: qkv.view(),
                            workspace: workspace.view_mut(),
                        },
                    )
                }
            });
        }
    }
}
