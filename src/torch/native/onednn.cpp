// A C interface to products of oneDNN. LibTorch's own `mkldnn_linear` keeps a copy of the rows in oneDNN's form for the backward
// pass, one for each product that reads them; here the operands are kept as they are, and only those that a gradient needs.

#include <cstdint>

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include "caught.h"

namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The rows, with rows of zeros behind them up to this number.
Tensor padded(const Tensor& rows, int64_t count) {
  const auto lacking = count - rows.size(0);
  return lacking == 0 ? rows.contiguous() : at::constant_pad_nd(rows, {0, 0, 0, lacking});
}

// [R, K] by [K, N].
Tensor product(const Tensor& rows, const Tensor& weight) {
  return at::mkldnn_linear(rows.to_mkldnn(), weight.t(), {}).to_dense();
}

struct Product : torch::autograd::Function<Product> {
  static Tensor forward(AutogradContext* context, const Tensor& rows, const Tensor& weight, int64_t count) {
    context->save_for_backward({weight.requires_grad() ? rows : Tensor(), rows.requires_grad() ? weight : Tensor()});
    context->saved_data["count"] = count;
    return product(padded(rows, count), weight).narrow(0, 0, rows.size(0));
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto& rows = saved[0];
    const auto& weight = saved[1];
    const auto gradient = padded(gradients[0], context->saved_data["count"].toInt());
    Tensor of_rows, of_weight;
    if (weight.defined()) {
      of_rows = product(gradient, weight.t()).narrow(0, 0, gradients[0].size(0));
    }
    if (rows.defined()) {
      of_weight = product(padded(rows, gradient.size(0)).t().contiguous(), gradient);
    }
    return {of_rows, of_weight, Tensor()};
  }
};

}  // namespace

extern "C" {

// Puts the product of f32 rows [R, K] and a weight [K, N] in the place of the rows. Inside, the rows are followed by zeros up to
// `count` rows.
bool interlace_onednn_product(Tensor* rows, const Tensor* weight, int64_t count, char** error) {
  return caught(error, [&] { *rows = Product::apply(*rows, *weight, count); });
}

}  // extern "C"
