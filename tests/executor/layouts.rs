//! The layouts of registers against the figures of the PTX ISA, written out: none of them is computed here.
//!
//! An entry `9.3` at row r, column c says that element 3 of lane 9 lies there. Elements of A and B are counted in 16-bit
//! halves, low first (a0, a1, ..; b0, b1, ..), those of C and D in registers.

use half::{bf16, f16};

use crate::{Buffer, Params, launch};

/// PTX ISA 9.0, matrix fragments for mma.m16n8k16 with floating point type: A (16 x 16).
const A: &str = "
 0.0  0.1  1.0  1.1  2.0  2.1  3.0  3.1  0.4  0.5  1.4  1.5  2.4  2.5  3.4  3.5
 4.0  4.1  5.0  5.1  6.0  6.1  7.0  7.1  4.4  4.5  5.4  5.5  6.4  6.5  7.4  7.5
 8.0  8.1  9.0  9.1 10.0 10.1 11.0 11.1  8.4  8.5  9.4  9.5 10.4 10.5 11.4 11.5
12.0 12.1 13.0 13.1 14.0 14.1 15.0 15.1 12.4 12.5 13.4 13.5 14.4 14.5 15.4 15.5
16.0 16.1 17.0 17.1 18.0 18.1 19.0 19.1 16.4 16.5 17.4 17.5 18.4 18.5 19.4 19.5
20.0 20.1 21.0 21.1 22.0 22.1 23.0 23.1 20.4 20.5 21.4 21.5 22.4 22.5 23.4 23.5
24.0 24.1 25.0 25.1 26.0 26.1 27.0 27.1 24.4 24.5 25.4 25.5 26.4 26.5 27.4 27.5
28.0 28.1 29.0 29.1 30.0 30.1 31.0 31.1 28.4 28.5 29.4 29.5 30.4 30.5 31.4 31.5
 0.2  0.3  1.2  1.3  2.2  2.3  3.2  3.3  0.6  0.7  1.6  1.7  2.6  2.7  3.6  3.7
 4.2  4.3  5.2  5.3  6.2  6.3  7.2  7.3  4.6  4.7  5.6  5.7  6.6  6.7  7.6  7.7
 8.2  8.3  9.2  9.3 10.2 10.3 11.2 11.3  8.6  8.7  9.6  9.7 10.6 10.7 11.6 11.7
12.2 12.3 13.2 13.3 14.2 14.3 15.2 15.3 12.6 12.7 13.6 13.7 14.6 14.7 15.6 15.7
16.2 16.3 17.2 17.3 18.2 18.3 19.2 19.3 16.6 16.7 17.6 17.7 18.6 18.7 19.6 19.7
20.2 20.3 21.2 21.3 22.2 22.3 23.2 23.3 20.6 20.7 21.6 21.7 22.6 22.7 23.6 23.7
24.2 24.3 25.2 25.3 26.2 26.3 27.2 27.3 24.6 24.7 25.6 25.7 26.6 26.7 27.6 27.7
28.2 28.3 29.2 29.3 30.2 30.3 31.2 31.3 28.6 28.7 29.6 29.7 30.6 30.7 31.6 31.7";

/// The same section: B (16 x 8).
const B: &str = "
 0.0  4.0  8.0 12.0 16.0 20.0 24.0 28.0
 0.1  4.1  8.1 12.1 16.1 20.1 24.1 28.1
 1.0  5.0  9.0 13.0 17.0 21.0 25.0 29.0
 1.1  5.1  9.1 13.1 17.1 21.1 25.1 29.1
 2.0  6.0 10.0 14.0 18.0 22.0 26.0 30.0
 2.1  6.1 10.1 14.1 18.1 22.1 26.1 30.1
 3.0  7.0 11.0 15.0 19.0 23.0 27.0 31.0
 3.1  7.1 11.1 15.1 19.1 23.1 27.1 31.1
 0.2  4.2  8.2 12.2 16.2 20.2 24.2 28.2
 0.3  4.3  8.3 12.3 16.3 20.3 24.3 28.3
 1.2  5.2  9.2 13.2 17.2 21.2 25.2 29.2
 1.3  5.3  9.3 13.3 17.3 21.3 25.3 29.3
 2.2  6.2 10.2 14.2 18.2 22.2 26.2 30.2
 2.3  6.3 10.3 14.3 18.3 22.3 26.3 30.3
 3.2  7.2 11.2 15.2 19.2 23.2 27.2 31.2
 3.3  7.3 11.3 15.3 19.3 23.3 27.3 31.3";

/// The same section: C and D (16 x 8).
const C: &str = "
 0.0  0.1  1.0  1.1  2.0  2.1  3.0  3.1
 4.0  4.1  5.0  5.1  6.0  6.1  7.0  7.1
 8.0  8.1  9.0  9.1 10.0 10.1 11.0 11.1
12.0 12.1 13.0 13.1 14.0 14.1 15.0 15.1
16.0 16.1 17.0 17.1 18.0 18.1 19.0 19.1
20.0 20.1 21.0 21.1 22.0 22.1 23.0 23.1
24.0 24.1 25.0 25.1 26.0 26.1 27.0 27.1
28.0 28.1 29.0 29.1 30.0 30.1 31.0 31.1
 0.2  0.3  1.2  1.3  2.2  2.3  3.2  3.3
 4.2  4.3  5.2  5.3  6.2  6.3  7.2  7.3
 8.2  8.3  9.2  9.3 10.2 10.3 11.2 11.3
12.2 12.3 13.2 13.3 14.2 14.3 15.2 15.3
16.2 16.3 17.2 17.3 18.2 18.3 19.2 19.3
20.2 20.3 21.2 21.3 22.2 22.3 23.2 23.3
24.2 24.3 25.2 25.3 26.2 26.3 27.2 27.3
28.2 28.3 29.2 29.3 30.2 30.3 31.2 31.3";

/// PTX ISA 9.0, ldmatrix: the halves of one register, per 8x8 matrix. Transposed, rows and columns change places.
const ROWS: &str = "
 0.0  0.1  1.0  1.1  2.0  2.1  3.0  3.1
 4.0  4.1  5.0  5.1  6.0  6.1  7.0  7.1
 8.0  8.1  9.0  9.1 10.0 10.1 11.0 11.1
12.0 12.1 13.0 13.1 14.0 14.1 15.0 15.1
16.0 16.1 17.0 17.1 18.0 18.1 19.0 19.1
20.0 20.1 21.0 21.1 22.0 22.1 23.0 23.1
24.0 24.1 25.0 25.1 26.0 26.1 27.0 27.1
28.0 28.1 29.0 29.1 30.0 30.1 31.0 31.1";

/// (row, column, lane, element) of a figure.
fn entries(figure: &str) -> Vec<(usize, usize, usize, usize)> {
    let rows = figure.lines().filter(|line| !line.trim().is_empty()).enumerate();
    rows.flat_map(|(row, line)| {
        line.split_whitespace().enumerate().map(move |(col, entry)| {
            let (lane, element) = entry.split_once('.').expect("lane.element");
            (row, col, lane.parse().expect("a lane"), element.parse().expect("an element"))
        })
    })
    .collect()
}

/// Whole numbers below 8 in size, exact in every format and in every sum here; no row or column like another.
fn matrix(rows: usize, cols: usize, salt: usize) -> Vec<Vec<f32>> {
    let value = |r: usize, c: usize| ((r * 37 + c * 101 + salt * 13 + r * c * 7) % 15) as f32 - 7.0;
    (0..rows).map(|r| (0..cols).map(|c| value(r, c)).collect()).collect()
}

fn mma_has_the_published_layout(is_f16: bool) {
    let (a, b, c) = (matrix(16, 16, 1), matrix(16, 8, 2), matrix(16, 8, 3));
    let half =
        |x: f32| if is_f16 { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() };
    // Registers of a lane: 4 of A, 2 of B, 4 of C.
    let mut words = vec![0u32; 320];
    for (row, col, lane, element) in entries(A) {
        words[lane * 10 + element / 2] |= u32::from(half(a[row][col])) << (element % 2 * 16);
    }
    for (row, col, lane, element) in entries(B) {
        words[lane * 10 + 4 + element / 2] |= u32::from(half(b[row][col])) << (element % 2 * 16);
    }
    for (row, col, lane, element) in entries(C) {
        words[lane * 10 + 6 + element] = c[row][col].to_bits();
    }
    let x = Buffer::of("registers", &words.map_f32());
    let y = Buffer::new("d", 128);
    for seed in [0, 3] {
        launch("layout_mma", [1, 32, 0], Params::new(&x, &y, i64::from(is_f16)), seed).unwrap();
        let d = y.read().unwrap();
        for (row, col, lane, element) in entries(C) {
            let sum: f32 = c[row][col] + (0..16).map(|k| a[row][k] * b[k][col]).sum::<f32>();
            assert_eq!(d[lane * 4 + element], sum, "row {row}, column {col}");
        }
    }
}

#[test]
fn mma_bf16_has_the_published_layout() {
    mma_has_the_published_layout(false);
}

#[test]
fn mma_f16_has_the_published_layout() {
    mma_has_the_published_layout(true);
}

#[test]
fn ldmatrix_has_the_published_layout() {
    // Matrix m holds 64 m + 8 row + column, 16 bits each.
    let words: Vec<u32> = (0..128).map(|i| (2 * i) | ((2 * i + 1) << 16)).collect();
    let x = Buffer::of("matrices", &words.map_f32());
    let y = Buffer::new("registers", 32 * 13);
    launch("layout_ldmatrix", [1, 32, 512], Params::new(&x, &y, 0), 5).unwrap();
    let out: Vec<u32> = y.read().unwrap().iter().map(|x| x.to_bits()).collect();
    // (first register of 13, matrices, transposed): x4, x4.trans, x2, x2.trans, x1.
    for (first, matrices, transposed) in
        [(0, 4, false), (4, 4, true), (8, 2, false), (10, 2, true), (12, 1, false)]
    {
        for (row, col, lane, element) in entries(ROWS) {
            let (row, col) = if transposed { (col, row) } else { (row, col) };
            for m in 0..matrices {
                let got = out[lane * 13 + first + m] >> (16 * element) & 0xffff;
                assert_eq!(
                    got as usize,
                    64 * m + 8 * row + col,
                    "register {first} + {m}, lane {lane}"
                );
            }
        }
    }
}

/// Registers travel as floats with the same bits.
trait MapF32 {
    fn map_f32(&self) -> Vec<f32>;
}

impl MapF32 for Vec<u32> {
    fn map_f32(&self) -> Vec<f32> {
        self.iter().map(|&bits| f32::from_bits(bits)).collect()
    }
}
