//! Each op by itself, at the shapes that it has in the steps of real networks.

mod adamw;
mod add_positions;
mod attention;
mod cast;
mod gather_tokens;
mod gelu;
mod grad_norm;
mod input;
mod layer_norm;
mod linear;
mod low_freq_target;
mod masked_mse_loss;
mod patch_embed;
mod random_masking;
mod resize;
mod restore_tokens;

use crate::Bench;
use crate::workload::{VIT_L, Workload};

pub(crate) fn bench(bench: &mut Bench) {
    let ops: [fn(&mut Bench); 16] = [
        random_masking::bench,
        resize::bench,
        input::bench,
        low_freq_target::bench,
        patch_embed::bench,
        layer_norm::bench,
        linear::bench,
        gelu::bench,
        attention::bench,
        add_positions::bench,
        restore_tokens::bench,
        gather_tokens::bench,
        masked_mse_loss::bench,
        grad_norm::bench,
        adamw::bench,
        cast::bench,
    ];
    for op in ops {
        op(bench);
    }
}

/// The encoder or the decoder of a network.
struct Stack {
    name: &'static str,
    tokens: usize,
    dim: usize,
    heads: usize,
}

fn stacks(w: &Workload) -> Vec<Stack> {
    let (tokens, config) = (1 + w.kept(), w.config);
    let mut stacks = vec![Stack { name: "encoder", tokens, dim: config.dim, heads: config.heads }];
    if has_own_decoder(w) {
        let tokens = 1 + config.patches();
        let (dim, heads) = (config.decoder_dim, config.decoder_heads);
        stacks.push(Stack { name: "decoder", tokens, dim, heads });
    }
    stacks
}

/// Whether images, masks and decoder are no other network's too: ViT-L's are ViT-B's.
fn has_own_decoder(w: &Workload) -> bool {
    w.name != VIT_L.name
}

/// Lengths of vectors of parameters. On the CPU of some of the parameters: all 112 million of ViT-B, with moments and
/// gradients, would take 1.8 GB.
fn parameters(bench: &Bench) -> Vec<(&'static str, usize)> {
    const MOST_ON_CPU: usize = 8 << 20;
    let most = match bench.dev {
        pixmim::Device::Cuda(_) => usize::MAX,
        _ => MOST_ON_CPU,
    };
    // More of them tell nothing new.
    let networks = bench.networks.iter().take(2);
    networks
        .map(|w| (w.name, pixmim::model::params::Table::new(&w.config).parameters().min(most)))
        .collect()
}
