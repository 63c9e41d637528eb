//! Costs against sums written out by hand, with sizes that are odd and all different.

use super::*;
use DType::{Bf16, F32, F64, U8};

fn cost(bytes: u64, flops: u64) -> Cost {
    Cost { bytes, flops }
}

#[test]
fn moved_rows_are_counted_once_and_accumulated_ones_twice() {
    // 3 x 5 in, 3 x 5 out, weight and bias of 5, mean and rstd of 3.
    assert_eq!(layer_norm_forward(F32, [3, 5]), cost(4 * (15 + 15 + 10 + 6), 0));
    assert_eq!(layer_norm_forward(Bf16, [3, 5]), cost(2 * (15 + 15 + 10) + 4 * 6, 0));
    // Input, upstream gradient, the stream's gradient twice, weight; statistics, two gradients twice.
    assert_eq!(layer_norm_backward(Bf16, [3, 5]), cost(2 * (60 + 5) + 4 * (6 + 20), 0));
    assert_eq!(gelu_forward(Bf16, 7), cost(28, 0));
    assert_eq!(gelu_backward(F32, 7), cost(84, 0));
    assert_eq!(grad_norm_forward(F32, 7), cost(28, 0));
    assert_eq!(cast_forward([F32, Bf16], 7), cost(42, 0));
    // Parameter and two moments twice, gradient once; the copy.
    assert_eq!(adamw_update(F32, 3, None), cost(84, 0));
    assert_eq!(adamw_update(F32, 3, Some(Bf16)), cost(90, 0));
}

#[test]
fn products_are_two_operations_a_term() {
    // 3 x 5 times 5 x 7, and 7 biases.
    let bytes = 4 * (15 + 35 + 7 + 21);
    assert_eq!(linear_forward(F32, [3, 5, 7], false), cost(bytes, 2 * 3 * 5 * 7));
    assert_eq!(linear_forward(F32, [3, 5, 7], true), cost(bytes + 4 * 21, 210));
    // Upstream gradient, input, weight, gradient of the input; those of weight and bias, twice, in f32.
    let bytes = 2 * (21 + 15 + 35 + 15) + 4 * 2 * (35 + 7);
    assert_eq!(linear_backward(Bf16, [3, 5, 7], false), cost(bytes, 2 * 210));
    assert_eq!(linear_backward(Bf16, [3, 5, 7], true), cost(bytes + 2 * 15, 420));
    let bytes = 2 * (21 + 15) + 4 * 2 * (35 + 7);
    assert_eq!(linear_backward_parameters(Bf16, [3, 5, 7]), cost(bytes, 210));
    // 2 images of 3 kept patches of 4, of 12 numbers each, to width 5: patches, weight, bias, class token, positions,
    // tokens.
    let numbers = 72 + 60 + 5 + 5 + 25 + 40;
    assert_eq!(patch_embed_forward(F32, [2, 4, 3, 12, 5]), cost(4 * numbers + 4 * 6, 720));
    let numbers = 72 + 40 + 2 * (60 + 5 + 5);
    assert_eq!(patch_embed_backward(F32, [2, 3, 12, 5]), cost(4 * numbers, 720));
}

#[test]
fn attention_has_two_products_forward_and_five_backward() {
    // 2 images, 3 tokens, 5 heads, width 10: a product is 2 * 3 * 3 * 10 operations for all heads of an image.
    let lse = 4 * 2 * 5 * 3;
    assert_eq!(attention_forward(Bf16, [2, 3, 5, 10]), cost(2 * (180 + 60) + lse, 720));
    // Upstream gradient, outputs, packed, packed gradient.
    let moved = 60 + 60 + 180 + 180;
    assert_eq!(attention_backward(Bf16, [2, 3, 5, 10]), cost(2 * moved + lse, 1800));
}

#[test]
fn moves_of_tokens_count_their_ids() {
    // 2 images, 5 patches, 3 kept: 2 masked; width 7.
    assert_eq!(random_masking_forward([2, 5]), cost(8 * 2 + 4 * 20, 0));
    // Kept tokens and class, mask token, positions; the same kept ones, and a row for each patch.
    let rows = 8 + 1 + 6 + 8 + 5;
    assert_eq!(add_positions_forward(F32, [2, 5, 3, 7]), cost(4 * rows * 7 + 4 * 6, 0));
    assert_eq!(add_positions_backward(Bf16, [5, 7]), cost(2 * 35 + 4 * 14, 0));
    let rows = 8 + 5 + 12;
    assert_eq!(restore_tokens_forward(Bf16, [2, 5, 3, 7]), cost(2 * rows * 7 + 4 * 10, 0));
    assert_eq!(restore_tokens_backward(Bf16, [2, 5, 3, 7]), cost(2 * rows * 7 + 4 * 10, 0));
    assert_eq!(gather_tokens_forward(F32, [2, 2, 7]), cost(4 * 2 * 28 + 4 * 4, 0));
    assert_eq!(gather_tokens_backward(F32, [2, 5, 2, 7]), cost(4 * (28 + 84) + 4 * 10, 0));
    assert_eq!(masked_mse_loss_forward_backward(Bf16, [2, 3, 5]), cost(2 * 60 + 4 * 30, 0));
}

#[test]
fn images_are_counted_as_crops() {
    // 2 crops of 7 x 7 from 5 x 6 and 8 x 9 pixels.
    assert_eq!(resize_forward([2, 7], 30 + 72), cost(3 * 102 + 3 * 98 + 2 * 6 * 8, 0));
    // 2 images of 6 x 6 in patches of 2: 9 patches of 12 numbers, 4 kept. 216 bytes in all.
    let common = 216 + 2 * 6 * 8 + 4 * 8 + 4 * 96;
    let sizes = [2, 6, 2, 4];
    assert_eq!(input_forward(F32, sizes, InputTarget::Filtered(U8)), cost(common + 216, 0));
    assert_eq!(input_forward(F64, sizes, InputTarget::Filtered(F64)), {
        cost(common + 4 * 96 + 8 * 216, 0)
    });
    assert_eq!(input_forward(F32, sizes, InputTarget::Raw), cost(common + 4 * 120 + 4 * 10, 0));
}

#[test]
fn the_filter_counts_its_truncated_transforms() {
    // As above. Radius 1.6 keeps (f + 1/2)^2 + 1/4 <= 2.56: four frequencies, -2 to 1.
    assert_eq!(low_freq_target::frequencies(6, 1.6), [-2, -1, 0, 1]);
    let bytes = 216 + 4 * 120 + 4 * 10;
    // A channel: 36 pixels times 4 cosines and 4 sines; 4 x 4 complex bins from 6 rows, four terms each, and back;
    // a masked pixel: a complex number from 4 complex ones.
    let channel = 36 * 8 + 2 * (4 * 4 * 6 * 4);
    let flops = 2 * (6 * channel + 120 * 4 * 4);
    assert_eq!(low_freq_target_forward([U8, F32], [2, 6, 2, 4], 1.6), cost(bytes, flops));
}

#[test]
fn costs_add_and_repeat() {
    let parts = [cost(1, 2), cost(10, 20)];
    assert_eq!(parts.into_iter().sum::<Cost>(), cost(11, 22));
    assert_eq!(cost(3, 5) * 7, cost(21, 35));
}

#[test]
fn the_nearer_roof_is_that_of_the_longer_time() {
    let peaks = Peaks { bytes_per_second: 100.0, flops_per_second: 1000.0 };
    let second = Duration::from_secs(1);
    // 2 s of memory against 1 s of products; then 2 s against 3 s.
    let memory = cost(200, 1000);
    assert_eq!(memory.roof(peaks), Roof::Memory);
    assert!((memory.share(peaks, 4 * second) - 0.5).abs() <= 1e-12);
    let compute = cost(200, 3000);
    assert_eq!(compute.roof(peaks), Roof::Compute);
    assert!((compute.share(peaks, 4 * second) - 0.75).abs() <= 1e-12);
    // What only moves numbers has the roof of memory, however fast the products.
    assert_eq!(cost(1, 0).roof(peaks), Roof::Memory);
}
