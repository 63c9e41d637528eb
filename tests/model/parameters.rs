//! Counts, names, shapes and initial values of the parameters: those of the original MAE.

use std::collections::BTreeMap;

use pixmim::model::params::Table;
use pixmim::model::{Mae, MaeConfig};
use pixmim::{DType, Device};

/// ViT-Ti/16 with a decoder of its own width.
const VIT_TINY_PATCH16: MaeConfig = MaeConfig {
    dim: 192,
    heads: 3,
    decoder_dim: 192,
    decoder_heads: 12,
    ..MaeConfig::VIT_SMALL_PATCH16
};

fn elems(shape: &[usize]) -> usize {
    shape.iter().product()
}

#[test]
fn counts_are_those_of_the_papers() {
    let counts = [
        ("B", MaeConfig::VIT_BASE_PATCH16, 85_798_656, 111_907_840, 111_655_680, Some(254)),
        ("L", MaeConfig::VIT_LARGE_PATCH16, 303_301_632, 329_541_888, 329_239_296, Some(398)),
        ("H", MaeConfig::VIT_HUGE_PATCH14, 630_764_800, 657_074_508, 656_613_964, Some(494)),
        ("S", MaeConfig::VIT_SMALL_PATCH16, 21_665_664, 36_381_696, 36_230_400, None),
        ("Ti", VIT_TINY_PATCH16, 5_524_416, 9_307_008, 9_231_360, None),
    ];
    for (name, config, encoder, total, trainable, tensors) in counts {
        let table = Table::new(&config);
        assert_eq!(table.parameters(), trainable, "{name}");
        let rows = 1 + config.patches();
        let positions = rows * (config.dim + config.decoder_dim);
        assert_eq!(table.parameters() + positions, total, "{name}, with both position tables");
        let of_encoder = |name: &str| !name.starts_with("decoder") && name != "mask_token";
        let specs = table.specs().iter().filter(|spec| of_encoder(&spec.name));
        let numbers: usize = specs.map(|spec| elems(&spec.shape)).sum();
        assert_eq!(numbers + rows * config.dim, encoder, "{name}, encoder with its positions");
        if let Some(tensors) = tensors {
            assert_eq!(table.specs().len() + 2, tensors, "{name}, tensors of its checkpoint");
        }
    }
}

/// No two sizes of it are alike.
const ODD: MaeConfig = MaeConfig {
    image_size: 15,
    patch_size: 5,
    dim: 12,
    depth: 2,
    heads: 3,
    decoder_dim: 8,
    decoder_depth: 1,
    decoder_heads: 2,
    mlp_ratio: 4,
};

#[test]
fn names_and_shapes_are_those_of_the_original_checkpoints() {
    let mut expected: Vec<(String, Vec<usize>)> = [
        ("cls_token", &[1, 1, 12][..]),
        ("patch_embed.proj.weight", &[12, 3, 5, 5]),
        ("patch_embed.proj.bias", &[12]),
        ("norm.weight", &[12]),
        ("norm.bias", &[12]),
        ("mask_token", &[1, 1, 8]),
        ("decoder_embed.weight", &[8, 12]),
        ("decoder_embed.bias", &[8]),
        ("decoder_norm.weight", &[8]),
        ("decoder_norm.bias", &[8]),
        ("decoder_pred.weight", &[75, 8]),
        ("decoder_pred.bias", &[75]),
    ]
    .map(|(name, shape)| (name.to_owned(), shape.to_vec()))
    .into();
    for (block, d) in [("blocks.0", 12), ("blocks.1", 12), ("decoder_blocks.0", 8)] {
        for (name, shape) in [
            ("norm1.weight", vec![d]),
            ("norm1.bias", vec![d]),
            ("attn.qkv.weight", vec![3 * d, d]),
            ("attn.qkv.bias", vec![3 * d]),
            ("attn.proj.weight", vec![d, d]),
            ("attn.proj.bias", vec![d]),
            ("norm2.weight", vec![d]),
            ("norm2.bias", vec![d]),
            ("mlp.fc1.weight", vec![4 * d, d]),
            ("mlp.fc1.bias", vec![4 * d]),
            ("mlp.fc2.weight", vec![d, 4 * d]),
            ("mlp.fc2.bias", vec![d]),
        ] {
            expected.push((format!("{block}.{name}"), shape));
        }
    }
    expected.sort();
    let table = Table::new(&ODD);
    let mut found: Vec<_> =
        table.specs().iter().map(|spec| (spec.name.clone(), spec.shape.clone())).collect();
    found.sort();
    assert_eq!(found, expected);

    let mae = Mae::new(&Device::cpu(), ODD, DType::F32, 0).unwrap();
    assert_eq!(mae.pos_embed.shape(), [10, 12]);
    assert_eq!(mae.decoder_pos_embed.shape(), [10, 8]);
}

/// MAE's source decays what has two dimensions or more, biases never; PixMIM's leaves out both tokens.
#[test]
fn matrices_decay_and_vectors_do_not() {
    let table = Table::new(&ODD);
    for decay_tokens in [false, true] {
        let decaying = table.decaying(decay_tokens);
        for (i, spec) in table.specs().iter().enumerate() {
            let is_token = spec.name.ends_with("_token");
            let decays = if is_token { decay_tokens } else { spec.shape.len() >= 2 };
            assert_eq!(i < decaying, decays, "{} with decay_tokens {decay_tokens}", spec.name);
        }
    }
}

/// What a tensor should start as.
enum Start {
    All(f32),
    Uniform(f64),
    Normal(f64),
}

fn start(name: &str, shape: &[usize]) -> Start {
    let patch_numbers = 3 * 8 * 8;
    let xavier = |inputs: usize, outputs: usize| (6.0 / (inputs + outputs) as f64).sqrt();
    match name {
        "cls_token" | "mask_token" => Start::Normal(0.02),
        "patch_embed.proj.weight" => Start::Uniform(xavier(patch_numbers, shape[0])),
        // What PyTorch gives the bias of a convolution, as nothing sets it anew.
        "patch_embed.proj.bias" => Start::Uniform((patch_numbers as f64).sqrt().recip()),
        _ if name.contains("norm") && name.ends_with("weight") => Start::All(1.0),
        _ if name.ends_with("bias") => Start::All(0.0),
        // Queries, keys and values count as one joint matrix.
        _ => Start::Uniform(xavier(shape[1], shape[0])),
    }
}

#[test]
fn initial_values_are_drawn_as_mae_draws_them() {
    let config = MaeConfig {
        image_size: 32,
        patch_size: 8,
        dim: 96,
        heads: 3,
        decoder_dim: 64,
        decoder_heads: 2,
        ..ODD
    };
    let mae = Mae::new(&Device::cpu(), config, DType::F32, 7).unwrap();
    for (i, spec) in mae.table().specs().iter().enumerate() {
        let name = &spec.name;
        let view = mae.weights.view(i);
        let values = view.as_slice::<f32>();
        let count = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let square = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / count;
        let largest = values.iter().fold(0.0, |most: f64, &x| most.max(f64::from(x).abs()));
        let std = match start(name, &spec.shape) {
            Start::All(value) => {
                assert!(values.iter().all(|&x| x == value), "{name}");
                continue;
            }
            Start::Uniform(bound) => {
                assert!(largest <= bound * (1.0 + 1e-6), "{name}: {largest} over {bound}");
                assert!(
                    largest >= bound * (1.0 - 8.0 / count),
                    "{name}: {largest} far from {bound}"
                );
                bound / 3f64.sqrt()
            }
            Start::Normal(std) => std,
        };
        // Five standard errors.
        assert!(mean.abs() <= 5.0 * std / count.sqrt(), "{name}: mean {mean}");
        let ratio = square.sqrt() / std;
        assert!((ratio - 1.0).abs() <= 5.0 / (2.0 * count).sqrt(), "{name}: std x {ratio}");
    }
}

#[test]
fn initial_values_follow_the_seed_and_differ_between_tensors() {
    let first = |seed: u64| {
        let mae = Mae::new(&Device::cpu(), ODD, DType::F64, seed).unwrap();
        let first = |(i, name): (usize, &str)| {
            (name.to_owned(), mae.weights.view(i).as_slice::<f64>()[0].to_bits())
        };
        let specs = mae.table().specs().iter().map(|spec| spec.name.as_str());
        let drawn =
            specs.enumerate().filter(|(_, name)| !name.ends_with("bias") && !name.contains("norm"));
        drawn.map(first).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(first(3), first(3));
    assert!(first(3).iter().zip(first(4)).all(|(a, b)| *a.1 != b.1));
    let mut values: Vec<_> = first(3).into_values().collect();
    values.sort_unstable();
    values.dedup();
    assert_eq!(values.len(), first(3).len(), "two tensors start alike");
}
