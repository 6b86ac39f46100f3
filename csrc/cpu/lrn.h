#pragma once
// LRN of dense tensors, as lrn and lrn_pool use it. Inside a parallel section they run in the calling thread.

#include "../tensors.h"

namespace fastcnn::cpu {

template <class T>
void lrn_into(const T* x, T* y, const Layout& layout, const LRN& norm);

template <class T>
void lrn_backward_into(const T* x, const T* grad, T* dx, const Layout& layout, const LRN& norm);

}  // namespace fastcnn::cpu
