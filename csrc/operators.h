// The operators' signatures, as the schemas in fastcnn/ops/<stem>.py have them. ops.h includes this once for every
// backend, in its namespace.

Tensor max_pool(const Tensor& input, const Window& window);
std::tuple<Tensor, Tensor> max_pool_codes(const Tensor& input, const Window& window);
Tensor max_pool_backward(const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, const Window& window);

Tensor lrn(const Tensor& input, int64_t size, double alpha, double beta, double k);
Tensor lrn_backward(const Tensor& grad, const Tensor& input, int64_t size, double alpha, double beta, double k);

Tensor lrn_pool(const Tensor& input, int64_t size, double alpha, double beta, double k, const Window& window);
std::tuple<Tensor, Tensor> lrn_pool_codes(
    const Tensor& input, int64_t size, double alpha, double beta, double k, const Window& window);
Tensor lrn_pool_backward(const Tensor& grad, const Tensor& codes, const Tensor& input, int64_t size, double alpha,
    double beta, double k, const Window& window);

Tensor conv_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, Sizes stride, Sizes padding,
    Sizes dilation, int64_t groups, std::optional<std::string> algorithm);
std::tuple<Tensor, Tensor> conv_relu_backward(const Tensor& grad, const Tensor& output, bool bias_grad);

Tensor conv_relu_pool(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, Sizes stride,
    Sizes padding, Sizes dilation, int64_t groups, std::optional<std::string> algorithm, const Window& window);
std::tuple<Tensor, Tensor> conv_relu_pool_codes(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
    Sizes stride, Sizes padding, Sizes dilation, int64_t groups, std::optional<std::string> algorithm,
    const Window& window);
std::tuple<Tensor, Tensor> conv_relu_pool_backward(
    const Tensor& grad, const Tensor& codes, int64_t height, int64_t width, bool bias_grad, const Window& window);

Tensor linear_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias);
std::tuple<Tensor, Tensor> linear_relu_backward(const Tensor& grad, const Tensor& output, bool bias_grad);

Tensor bn_relu_statistics(const Tensor& input);
Tensor bn_relu(const Tensor& input, const Tensor& mean, const Tensor& variance, std::optional<Tensor> weight,
    std::optional<Tensor> bias, double eps);
std::tuple<Tensor, Tensor, Tensor> bn_relu_backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
    const Tensor& variance, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, bool training);

Tensor bn_relu_pool(const Tensor& input, const Tensor& mean, const Tensor& variance, std::optional<Tensor> weight,
    std::optional<Tensor> bias, double eps, const Window& window);
std::tuple<Tensor, Tensor> bn_relu_pool_codes(const Tensor& input, const Tensor& mean, const Tensor& variance,
    std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, const Window& window);
std::tuple<Tensor, Tensor, Tensor> bn_relu_pool_backward(const Tensor& grad, const Tensor& codes, const Tensor& input,
    const Tensor& mean, const Tensor& variance, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
    bool training, const Window& window);

Tensor add_relu(const Tensor& input, const Tensor& other);
Tensor add_relu_backward(const Tensor& grad, const Tensor& output);
