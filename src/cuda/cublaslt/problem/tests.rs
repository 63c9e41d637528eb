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
        epilogue: Epilogue::None,
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
    for batch in 0..shape.batch as usize {
        for col in 0..shape.out.cols as usize {
            for row in 0..shape.out.rows as usize {
                let product =
                    |k| a[place(&shape.a, batch, row, k)] * b[place(&shape.b, batch, k, col)];
                let sum: f64 = (0..depth(shape)).map(product).sum();
                let at = place(&shape.out, batch, row, col);
                d[at] = sum + beta * c[at] + bias[row];
            }
        }
    }
}

/// Where an element of a column-major matrix lies, as it is multiplied.
fn place(x: &Operand, batch: usize, row: usize, col: usize) -> usize {
    let (row, col) = if x.transposed { (col, row) } else { (row, col) };
    assert!(row < x.rows as usize && col < x.cols as usize && x.rows as i64 <= x.leading);
    batch * x.batch_stride as usize + row + col * x.leading as usize
}

fn depth(shape: &ColumnMajor) -> usize {
    (if shape.a.transposed { shape.a.rows } else { shape.a.cols }) as usize
}

/// cublasLt's manual on bias gradients: "of the input matrix A" is as long as D has rows, "of B" as it has columns, and both
/// are sums over k.
fn bias_gradient(problem: &Problem, a: &[f64], b: &[f64]) -> Vec<f64> {
    let shape = problem.column_major();
    let (count, element): (_, Box<dyn Fn(usize, usize) -> f64>) = match problem.epilogue() {
        sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BGRADA => {
            (shape.out.rows, Box::new(|i, k| a[place(&shape.a, 0, i, k)]))
        }
        sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BGRADB => {
            (shape.out.cols, Box::new(|i, k| b[place(&shape.b, 0, k, i)]))
        }
        other => panic!("{other:?} has no bias gradient"),
    };
    (0..count as usize).map(|i| (0..depth(&shape)).map(|k| element(i, k)).sum()).collect()
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
    assert_eq!(problem.vector(), None);
    let problem = super::Problem::new(&Matmul { bias: Some(DevPtr(0x4000)), ..two() }).unwrap();
    assert_eq!(problem.vector(), Some(5));
}

/// (3, 7) by (7, 5) to bf16, as GELU in a product needs it, or to f32, as sums of rows do.
fn one(out: DType, bias: bool, epilogue: Epilogue) -> Matmul {
    let Matmul { mut a, mut b, .. } = two();
    (a.dtype, b.dtype) = (DType::Bf16, DType::Bf16);
    let out = matrix(0x3000, out, 16, 0, false);
    Matmul { batch: 1, a, b, out, bias: bias.then_some(DevPtr(0x4000)), epilogue, ..two() }
}

#[test]
fn sums_of_rows_are_those_over_k_of_our_left_factor() {
    let a: Vec<f64> = (0..64).map(|i| f64::from(i * i % 23)).collect();
    let b: Vec<f64> = (0..64).map(|i| f64::from(i * i % 29) - 100.0).collect();
    for (a_transposed, b_transposed) in [(false, false), (false, true), (true, false), (true, true)]
    {
        let mut matmul = one(F32, false, Epilogue::RowSums(DevPtr(0x6000)));
        (matmul.a.transposed, matmul.a.row_stride) = (a_transposed, 9);
        (matmul.b.transposed, matmul.b.row_stride) = (b_transposed, 8);
        let element = |row: usize, k| a[if a_transposed { k * 9 + row } else { row * 9 + k }];
        let sums: Vec<f64> = (0..3).map(|row| (0..7).map(|k| element(row, k)).sum()).collect();
        let problem = problem(&matmul);
        // Factors change places, as in Plans::run.
        assert_eq!(bias_gradient(&problem, &b, &a), sums, "{problem}");
        assert_eq!(problem.vector(), Some(sums.len()));
    }
}

#[test]
fn a_plan_depends_on_the_epilogue_and_not_on_its_address() {
    let bf16 = DType::Bf16;
    let at = DevPtr(0x6000);
    let all = [
        one(bf16, false, Epilogue::None),
        one(bf16, true, Epilogue::None),
        one(bf16, true, Epilogue::Gelu(at)),
        one(bf16, false, Epilogue::GeluSlope(at)),
        one(F32, false, Epilogue::None),
        one(F32, false, Epilogue::RowSums(at)),
    ]
    .map(|matmul| problem(&matmul));
    for (i, problem) in all.iter().enumerate() {
        assert!(!all[..i].contains(problem), "{problem}");
    }
    let codes = all.map(|problem| problem.epilogue() as u32);
    assert_eq!(codes, [1, 4, 164, 192, 1, 512]);
    assert_eq!(all.map(|problem| problem.has_aux()), [false, false, true, true, false, false]);
    assert_eq!(problem(&one(bf16, true, Epilogue::Gelu(DevPtr(0x6010)))), all[2]);
}

#[test]
fn epilogues_that_cublaslt_has_not_are_refused() {
    let (bf16, at) = (DType::Bf16, DevPtr(0x6000));
    let refused = |matmul: Matmul, why: &str| {
        let refusal = refusal(&matmul);
        assert!(refusal.contains(why), "{refusal}");
    };
    let gelu = one(bf16, true, Epilogue::Gelu(at));
    let slope = one(bf16, false, Epilogue::GeluSlope(at));
    let sums = one(F32, false, Epilogue::RowSums(at));
    for matmul in [
        Matmul { bias: None, ..gelu },
        Matmul { add: Some(DevPtr(0x5000)), ..gelu },
        Matmul { out: Matrix { dtype: F32, ..gelu.out }, ..gelu },
        Matmul { bias: Some(DevPtr(0x4000)), ..slope },
        Matmul { add: Some(slope.out.ptr), ..slope },
        Matmul { batch: 2, out: Matrix { batch_stride: 90, ..slope.out }, ..slope },
        Matmul { bias: Some(DevPtr(0x4000)), ..sums },
        Matmul { out: Matrix { dtype: bf16, ..sums.out }, ..sums },
    ] {
        refused(matmul, "goes with no such");
    }
    for address in [0, 0x6008] {
        let epilogue = Epilogue::RowSums(DevPtr(address));
        refused(Matmul { epilogue, ..sums }, "not a multiple of 16");
    }
    let narrow = Matrix { row_stride: 12, ..gelu.out };
    refused(Matmul { out: narrow, ..gelu }, "not of 12; leave `gelu` out of PIXMIM_EPILOGUES");
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
