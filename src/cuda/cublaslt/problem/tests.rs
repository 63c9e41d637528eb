use super::*;

const F32: DType = DType::F32;

fn matrix(ptr: u64, dtype: DType, row_stride: usize, batch_stride: usize, t: bool) -> Matrix {
    Matrix { ptr: DevPtr(ptr), dtype, row_stride, batch_stride, transposed: t }
}

/// Two (3, 7) by (7, 5), rows and matrices apart by gaps.
fn two() -> Matmul {
    Matmul {
        m: 3,
        n: 5,
        k: 7,
        batch: 2,
        a: matrix(0x1000, F32, 8, 30, false),
        b: matrix(0x2000, F32, 6, 45, false),
        out: matrix(0x3000, F32, 9, 28, false),
        bias: None,
        add: None,
    }
}

fn problem(matmul: &Matmul) -> Problem {
    Problem::new(matmul).unwrap()
}

fn refusal(matmul: &Matmul) -> String {
    Problem::new(matmul).unwrap_err().to_string()
}

/// cublasLt's manual in code: `d = op(a) op(b) + beta c + bias`, all column-major, the bias along the rows of `d`.
fn column_major(
    shape: &ColumnMajor,
    (a, b): (&[f64], &[f64]),
    beta: f64,
    (c, d): (&[f64], &mut [f64]),
    bias: &[f64],
) {
    let at = |x: &Operand, batch: usize, row: usize, col: usize| {
        let (row, col) = if x.transposed { (col, row) } else { (row, col) };
        assert!(row < x.rows as usize && col < x.cols as usize && x.rows as i64 <= x.leading);
        batch * x.batch_stride as usize + row + col * x.leading as usize
    };
    let depth = if shape.a.transposed { shape.a.rows } else { shape.a.cols } as usize;
    for batch in 0..shape.batch as usize {
        for col in 0..shape.out.cols as usize {
            for row in 0..shape.out.rows as usize {
                let product = |k| a[at(&shape.a, batch, row, k)] * b[at(&shape.b, batch, k, col)];
                let sum: f64 = (0..depth).map(product).sum();
                let at = at(&shape.out, batch, row, col);
                d[at] = sum + beta * c[at] + bias[row];
            }
        }
    }
}

/// The contract of [`Matmul`] in code.
fn row_major(matmul: &Matmul, a: &[f64], b: &[f64], add: &[f64], bias: &[f64], out: &mut [f64]) {
    let at = |x: &Matrix, batch: usize, row: usize, col: usize| {
        let (row, col) = if x.transposed { (col, row) } else { (row, col) };
        batch * x.batch_stride + row * x.row_stride + col
    };
    for batch in 0..matmul.batch {
        for row in 0..matmul.m {
            for col in 0..matmul.n {
                let product = |k| a[at(&matmul.a, batch, row, k)] * b[at(&matmul.b, batch, k, col)];
                let sum: f64 = (0..matmul.k).map(product).sum();
                let at = at(&matmul.out, batch, row, col);
                out[at] = sum + add[at] + bias[col];
            }
        }
    }
}

#[test]
fn the_column_major_product_is_the_row_major_one() {
    let numbers = |count: usize, seed: usize| {
        (0..count).map(|i| ((i * 5 + seed) % 17) as f64 - 8.0).collect()
    };
    for flags in 0..128 {
        let flag = |bit: u32| flags & 1 << bit != 0;
        let mut matmul = two();
        let size = |rows: usize, cols: usize, stored: &mut Matrix, transposed: bool| {
            let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
            stored.transposed = transposed;
            stored.row_stride = cols + 2;
            stored.batch_stride = rows * stored.row_stride + 3;
        };
        let Matmul { m, n, k, .. } = matmul;
        size(m, k, &mut matmul.a, flag(0));
        size(k, n, &mut matmul.b, flag(1));
        matmul.batch = if flag(2) { 3 } else { 1 };
        if flag(3) {
            matmul.a.batch_stride = 0;
        }
        if flag(4) {
            matmul.b.batch_stride = 0;
        }
        matmul.bias = flag(5).then_some(DevPtr(0x4000));
        matmul.add = flag(6).then_some(DevPtr(0x5000));

        let a: Vec<f64> = numbers(400, 1);
        let b: Vec<f64> = numbers(400, 2);
        let add: Vec<f64> = if flag(6) { numbers(400, 3) } else { vec![0.0; 400] };
        let bias: Vec<f64> = if flag(5) { numbers(5, 4) } else { vec![0.0; 5] };
        let mut expected = vec![f64::MAX; 400];
        row_major(&matmul, &a, &b, &add, &bias, &mut expected);

        let problem = problem(&matmul);
        assert_eq!((problem.has_bias(), problem.add() != Add::Nothing), (flag(5), flag(6)));
        let mut found = vec![f64::MAX; 400];
        // Factors change places, as in Plans::run.
        let factors = (b.as_slice(), a.as_slice());
        column_major(&problem.column_major(), factors, 1.0, (&add, &mut found), &bias);
        assert_eq!(found, expected, "{problem}");
    }
}

#[test]
fn scratch_covers_what_a_product_touches() {
    let problem = problem(&two());
    let shape = problem.column_major();
    // The last element of the second matrix: cublasLt's A is `b` here.
    assert_eq!(problem.bytes(&shape.a, F32), (45 + 6 * 6 + 5) * 4);
    assert_eq!(problem.bytes(&shape.b, F32), (30 + 2 * 8 + 7) * 4);
    assert_eq!(problem.bytes(&shape.out, DType::Bf16), (28 + 2 * 9 + 5) * 2);
    assert_eq!(problem.bias_bytes(), 5 * 4);
}

#[test]
fn a_plan_depends_on_all_that_decides_and_on_no_address() {
    let same = |change: fn(&mut Matmul)| {
        let mut matmul = two();
        change(&mut matmul);
        problem(&matmul) == problem(&two())
    };
    assert!(same(|_| ()));
    assert!(same(|matmul| matmul.a.ptr.0 += 0x100));
    let changes: [fn(&mut Matmul); 15] = [
        |matmul| matmul.m = 2,
        |matmul| matmul.n = 4,
        |matmul| matmul.k = 6,
        |matmul| matmul.batch = 3,
        |matmul| matmul.a.row_stride = 9,
        |matmul| matmul.b.batch_stride = 46,
        |matmul| matmul.out.row_stride = 8,
        |matmul| (matmul.a.transposed, matmul.k) = (true, 3),
        |matmul| (matmul.b.transposed, matmul.k) = (true, 5),
        |matmul| (matmul.a.dtype, matmul.b.dtype) = (DType::Bf16, DType::Bf16),
        |matmul| matmul.bias = Some(DevPtr(0x4000)),
        |matmul| matmul.add = Some(matmul.out.ptr),
        |matmul| matmul.add = Some(DevPtr(0x5000)),
        |matmul| matmul.a.ptr.0 += 16,
        |matmul| matmul.out.ptr.0 += 4,
    ];
    let mut seen = vec![problem(&two())];
    for (index, change) in changes.into_iter().enumerate() {
        let mut matmul = two();
        change(&mut matmul);
        let problem = problem(&matmul);
        assert!(!seen.contains(&problem), "change {index}");
        seen.push(problem);
    }
    // One matrix: how far the next would be means nothing.
    let one = |batch_stride| {
        let mut matmul = Matmul { batch: 1, ..two() };
        matmul.a.batch_stride = batch_stride;
        problem(&matmul)
    };
    assert_eq!(one(0), one(30));
}

#[test]
fn alignments_are_those_of_the_addresses_in_the_order_of_cublaslt() {
    let mut matmul = two();
    matmul.a.ptr.0 = 0x1010;
    matmul.b.ptr.0 = 0x2004;
    matmul.out.ptr.0 = 0x3080;
    matmul.add = Some(DevPtr(0x5008));
    assert_eq!(problem(&matmul).alignments(), [4, 16, 8, 16]);
    matmul.add = None;
    matmul.out.ptr.0 = 0x3000;
    assert_eq!(problem(&matmul).alignments(), [4, 16, 256, 256]);
}

#[test]
fn what_cublaslt_would_do_wrong_is_refused() {
    type Change = fn(&mut Matmul);
    let changes: [(Change, &str); 10] = [
        (|matmul| matmul.k = 0, "size"),
        (|matmul| matmul.batch = 1 << 31, "31 bits"),
        (|matmul| matmul.out.dtype = DType::Bf16, "dtypes"),
        (|matmul| matmul.b.dtype = DType::Bf16, "dtypes"),
        (|matmul| matmul.a.dtype = DType::F64, "dtypes"),
        (|matmul| matmul.a.row_stride = 6, "overlap"),
        (|matmul| matmul.out.batch_stride = 22, "overlap"),
        (|matmul| matmul.b.ptr.0 += 2, "cuts an element"),
        (|matmul| matmul.out.batch_stride = 0, "its matrices are one"),
        (|matmul| matmul.bias = Some(DevPtr(0x4008)), "bias"),
    ];
    for (change, why) in changes {
        let mut matmul = two();
        change(&mut matmul);
        assert!(refusal(&matmul).contains(why), "{}", refusal(&matmul));
    }
    let mut matmul = two();
    matmul.out.transposed = true;
    matmul.out.row_stride = 3;
    assert!(Problem::new(&matmul).is_err());
}
